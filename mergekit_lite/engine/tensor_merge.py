"""How each job's blocks are combined: at once, or after passes that gather the statistics its method needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.deferred import torch
from mergekit_lite.engine.buffers import CPU, WorkerBuffers, is_summed
from mergekit_lite.engine.tiling import CHUNK, cut
from mergekit_lite.methods import Method, method_named
from mergekit_lite.methods.passes import (
    SAMPLE_EVERY,
    Block,
    Kernel,
    Passes,
    TensorInfo,
    Totals,
    Weighted,
    joined,
    sample,
    sections,
    send_totals,
    statistics_block,
)
from mergekit_lite.ops import c_ops
from mergekit_lite.planning import Job, Plan

LARGE = 1 << 26  # elements; smaller tensors are gathered by the worker that merges them, while they are in the cache
Input = TypeVar("Input")
Section = tuple[int, int, int]  # number of the way, begin, end


class TensorMerge:
    """One merged job of one variant on its way through its method."""

    def __init__(self, job: Job, variant: int, seed: int, offset: int, extent: int, rounding: str) -> None:
        """Go as far as the method's first request."""
        self.job = job
        self.method: Method = method_named(job.method)
        models = len(job.inputs) - job.has_base
        self.arguments = self.method.resolve(job.parameters[variant], models, job.has_base)
        self.row = self.method.row_length(job.shape, self.arguments)
        info = TensorInfo(job.name, job.shape, models, job.has_base, seed, offset, extent)
        self.passes: Passes = self.method.start(info, self.arguments)
        self.to_nearest = rounding == "nearest"
        self.inputs = [spec.dtype for spec in job.inputs]

    @property
    def is_shared(self) -> bool:
        """Whether the sums it waits for are not for one worker alone."""
        return self.passes.request is not None and (self.passes.group is not None or self.job.numel > LARGE)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """What its statistics gave each model, where that is worth a report."""
        return self.passes.combine.coefficients if isinstance(self.passes.combine, Weighted) else ()

    @property
    def kernel(self) -> Kernel | None:
        """What merges chunks on the CPU without torch, once all statistics are there, where there is such."""
        served = self.to_nearest and c_ops.serve([*self.inputs, self.job.dtype])
        return self.passes.kernel if served else None

    @property
    def kernel_of_sums(self) -> Callable[[Sequence[c_ops.Run], int], Totals] | None:
        """What gives the requested sums on the CPU without torch, where there is such."""
        served = c_ops.serve([*self.inputs, self.job.dtype])
        return self.passes.request.kernel if self.passes.request is not None and served else None

    @cached_property
    def working(self) -> torch.dtype:
        """What torch computes in."""
        return dtypes.working([*self.inputs, self.job.dtype])

    def combine(self, block: Block, start: int) -> torch.Tensor:
        """Merge one block, as it is stored, by torch, once all statistics are there."""
        return self.passes.merge(block, start, self.working, self.row)

    def sections(self) -> list[tuple[int, int]]:
        """The (begin, end) of each section of the tensor that the requested sums need."""
        assert self.passes.request is not None
        return sections(self.passes.request, self.job.numel, self.row)

    def bytes_to_sum(self, begin: int, end: int) -> int:
        """Bytes read for one section of the requested sums."""
        assert self.passes.request is not None
        share = SAMPLE_EVERY if self.passes.request.sampled else 1
        return sum(spec.stored_bytes(end - begin) for spec in self.job.inputs) // share

    def sum(self, buffers: WorkerBuffers, reader: Reader, begin: int, end: int) -> Totals:
        """The requested sums over one section."""
        assert self.passes.request is not None
        inputs = list(enumerate(self.job.inputs))
        if self.passes.request.sampled:
            pieces = sample(begin, end)
            picked = [buffers.gather(reader, number, spec, pieces) for number, spec in inputs]
            return self._sums(buffers, picked, 0, sum(count for _, count in pieces))
        block = statistics_block(self.row)
        return joined(
            self._sums(
                buffers, [buffers.read(reader, number, spec, start, count) for number, spec in inputs], start, block
            )
            for start, count in cut(begin, end, max(block, CHUNK // block * block))
        )

    def _sums(self, buffers: WorkerBuffers, chunks: Sequence[memoryview], start: int, block: int) -> Totals:
        """The requested sums over a chunk, block by block."""
        request = self.passes.request
        assert request is not None
        kernel = self.kernel_of_sums if buffers.device == CPU else None
        if kernel is not None:
            runs = self.runs(chunks)
            return joined(
                kernel([run.part(slice(first, first + count)) for run in runs], start + first)
                for first, count in cut(0, runs[0].count, block)
            )
        total: torch.Tensor | None = None
        with torch.inference_mode():
            stored = self.tensors(chunks)
            for first, count in cut(0, stored[0].numel(), block):
                fetched = [buffers.fetch(tensor[first : first + count]) for tensor in stored]
                part = self.passes.sum(fetched, start + first, self.working, self.row)
                # Kept parts would lie between the freed temporaries, and the heap would grow with every block.
                total = part.clone() if total is None else total.add_(part)
            assert total is not None
            totals: Totals = total.cpu().numpy()
        return totals

    def prepare(self, buffers: WorkerBuffers, reader: Reader) -> None:
        """Gather what statistics of the tensor itself are missing."""
        while self.passes.request is not None:
            self.passes.send(joined(self.sum(buffers, reader, *section) for section in self.sections()))

    def runs(self, chunks: Sequence[memoryview]) -> list[c_ops.Run]:
        """The inputs' chunks, which come in the job's order, as a kernel wants them: the base first."""
        return self._base_first([c_ops.run(chunk, dtype) for chunk, dtype in zip(chunks, self.inputs, strict=True)])

    def tensors(self, chunks: Sequence[memoryview]) -> Block:
        """The same as torch wants them."""
        return self._base_first([tensor_of(chunk, dtype) for chunk, dtype in zip(chunks, self.inputs, strict=True)])

    def _base_first(self, inputs: list[Input]) -> list[Input]:
        return [inputs[-1], *inputs[:-1]] if self.job.has_base else inputs


def ways(plan: Plan, variants: list[int]) -> dict[tuple[int, int], TensorMerge]:
    """The ways of all merged jobs, by (job, variant)."""
    found: dict[tuple[int, int], TensorMerge] = {}
    offset, extent = 0, sum(job.numel for job in plan.jobs)
    for index, job in enumerate(plan.jobs):
        if job.merged:
            for variant in variants:
                found[index, variant] = TensorMerge(job, variant, plan.seed, offset, extent, plan.rounding)
        offset += job.numel
    return found


def without_torch(job: Job, ways: Sequence[TensorMerge]) -> bool:
    """Whether all that makes a tensor on the CPU is copying and c_ops, as far as can be told before its statistics.

    Args:
        job: the tensor.
        ways: how its variants are merged.
    """
    return (
        all((way.kernel if way.passes.request is None else way.kernel_of_sums) is not None for way in ways)
        and (job.merged == job.numel or (job.inputs[0].dtype == job.dtype and not is_summed(job.dtype)))
        and all(spec.is_plain for spec in job.inputs)
    )


def needed(found: Mapping[tuple[int, int], TensorMerge], jobs: Collection[int]) -> dict[tuple[int, int], TensorMerge]:
    """The ways of some jobs, and of those whose sums they wait for: all tensors of their groups."""
    groups = {way.passes.group for (job, _), way in found.items() if job in jobs} - {None}
    return {key: way for key, way in found.items() if key[0] in jobs or way.passes.group in groups}


def gather(pending: Sequence[TensorMerge], everywhere: Callable[[Sequence[Section]], Mapping[Section, Totals]]) -> None:
    """Gather the sums that span several tensors, and those of large tensors, which are work for several workers.

    Args:
        pending: all ways.
        everywhere: sums some sections, each (number of the way, begin, end).
    """
    while waiting := [number for number, way in enumerate(pending) if way.is_shared]:
        wanted = {number: [(number, *section) for section in pending[number].sections()] for number in waiting}
        parts = everywhere([section for of_way in wanted.values() for section in of_way])
        send_totals(
            [pending[number].passes for number in waiting],
            [[parts[part] for part in of_way] for of_way in wanted.values()],
        )
