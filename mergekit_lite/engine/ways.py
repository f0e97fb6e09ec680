"""How each job's blocks are combined: at once, or after passes that gather the statistics its method needs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.engine.lane import Lane
from mergekit_lite.engine.spans import CHUNK, cut
from mergekit_lite.methods import Method, method_named
from mergekit_lite.methods.passes import SAMPLE_PIECE, STATISTICS_BLOCK, Block, Passes, Subject, Sums, sample
from mergekit_lite.plan import Job, Plan


class Way:
    """One merged job of one variant on its way through its method."""

    def __init__(self, job: Job, variant: int, seed: int, offset: int, extent: int) -> None:
        """Go as far as the method's first request."""
        self.job = job
        self.method: Method = method_named(job.method)
        models = len(job.inputs) - job.has_base
        self.arguments = self.method.resolve(job.parameters[variant], models, job.has_base)
        self.row = self.method.row_length(job.shape, self.arguments)
        subject = Subject(job.name, job.shape, models, job.has_base, seed, offset, extent)
        self.passes: Passes = self.method.start(subject, self.arguments)
        self.lock = threading.Lock()
        dtypes_in = [dtypes.torch_dtype(spec.dtype) for spec in job.inputs]
        self.output = dtypes.torch_dtype(job.dtype)
        self.working = dtypes.working(dtypes_in, self.output)
        self.takes_16_bits = (
            self.method.rounds_once and self.output.itemsize <= 2 and all(dtype == self.output for dtype in dtypes_in)
        )

    @property
    def group(self) -> str | None:
        """The group of tensors whose sums it waits for."""
        return self.passes.request.group if self.passes.request is not None else None

    def combine(self, inputs: list[torch.Tensor], start: int, direct: bool) -> torch.Tensor:
        """Merge one block (inputs in the job's order), once all statistics are there.

        16-bit inputs of the output's own dtype go in as they are where the method rounds once by itself and ``direct``
        is set. All else is widened first.
        """
        if direct and self.takes_16_bits:
            result: torch.Tensor = self.method.function(*inputs, **self.arguments)
            return result
        assert self.passes.combine is not None
        return self.passes.combine(self._block(inputs), start).reshape(-1)

    def total(self, lane: Lane, reader: Reader) -> torch.Tensor | None:
        """One pass over the tensor for the requested sums; None where none of its elements contributes."""
        request = self.passes.request
        assert isinstance(request, Sums)
        if request.sampled:
            return self._of_sample(request, lane, reader)
        begin, end = request.within or (0, self.job.numel)
        step = max(1, STATISTICS_BLOCK // max(1, self.row)) * max(1, self.row)
        total: torch.Tensor | None = None
        for start, count in cut(begin // step * step, min(end, self.job.numel), max(step, CHUNK // step * step)):
            count = min(-(-count // step) * step, self.job.numel - start)
            inputs = [lane.read(reader, n, spec, start, count) for n, spec in enumerate(self.job.inputs)]
            for first, length in cut(0, count, step):
                block = self._block([lane.fetch(chunk[first : first + length]) for chunk in inputs])
                part = request.of(block, start + first)
                # Kept parts would lie between the freed temporaries, and the heap would grow with every block.
                total = part.clone() if total is None else total.add_(part)
        return total

    def _of_sample(self, request: Sums, lane: Lane, reader: Reader) -> torch.Tensor | None:
        """The requested sums over the tensor's sample, as many pieces at once as the buffers hold."""
        total: torch.Tensor | None = None
        pieces = list(sample(self.job.numel))
        at_once = STATISTICS_BLOCK // SAMPLE_PIECE
        for first in range(0, len(pieces), at_once):
            here = pieces[first : first + at_once]
            inputs = [lane.gather(reader, n, spec, here) for n, spec in enumerate(self.job.inputs)]
            part = request.of(self._block([lane.fetch(picked) for picked in inputs]), 0)
            total = part.clone() if total is None else total.add_(part)
        return total

    def prepare(self, lane: Lane, reader: Reader) -> None:
        """Gather what statistics of the tensor itself are missing. Safe to call from many lanes; one does the work."""
        with self.lock:
            while self.passes.request is not None:
                total = self.total(lane, reader)
                assert total is not None
                self.passes.send(total)

    def _block(self, inputs: list[torch.Tensor]) -> Block:
        """The inputs as a method wants them: the base first, in the working dtype, whole rows where it needs them."""
        ordered = [inputs[-1], *inputs[:-1]] if self.job.has_base else inputs
        wide = [block.to(self.working) for block in ordered]
        return [block.view(-1, self.row) for block in wide] if self.row else wide


def ways(plan: Plan, variants: list[int]) -> dict[tuple[int, int], Way]:
    """The ways of all merged jobs, by (job, variant)."""
    found: dict[tuple[int, int], Way] = {}
    offset, extent = 0, sum(job.numel for job in plan.jobs)
    for index, job in enumerate(plan.jobs):
        if job.merged:
            for variant in variants:
                found[index, variant] = Way(job, variant, plan.seed, offset, extent)
        offset += job.numel
    return found


def gather_groups(pending: list[Way], everywhere: Callable[[list[Way]], dict[int, torch.Tensor | None]]) -> None:
    """Gather the sums that span several tensors, as long as any tensor waits for one.

    Args:
        pending: all ways.
        everywhere: makes one pass over the tensors of some ways, and gives each one's total by its place in the list.
    """
    while waiting := [way for way in pending if way.group is not None]:
        parts = everywhere(waiting)
        totals: dict[str, torch.Tensor] = {}
        for number, way in enumerate(waiting):  # in the plan's order, so that the last bits are the same in every run
            if (part := parts[number]) is not None:
                group = str(way.group)
                totals[group] = totals[group] + part if group in totals else part
        for way in waiting:
            way.passes.send(totals[str(way.group)])
