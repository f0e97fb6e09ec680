"""The merge of one job: a ``TensorMerge`` that reads its blocks from files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_lite import draws, dtypes
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.deferred import np, torch
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.tiling import CHUNK, cut
from mergekit_lite.methods import method_named
from mergekit_lite.methods.contract import Reduction, TensorInfo, Totals
from mergekit_lite.methods.tensor_merge import SAMPLE_EVERY, TensorMerge, joined, sample, send_totals
from mergekit_lite.ops import Ops, TensorKind, finite_needs_torch, ops_for
from mergekit_lite.ops.operations import Cast
from mergekit_lite.planning import Job, Plan

LARGE = 1 << 26  # elements; smaller tensors are gathered by the worker that merges them, while they are in the cache
Section = tuple[int, int, int]  # number of the merge, begin, end


class JobMerge(TensorMerge):
    """One merged job of one output of a plan; ``offset`` and ``extent`` are as in ``TensorInfo``."""

    def __init__(self, plan: Plan, job: Job, output: int, offset: int, extent: int) -> None:
        self.job = job
        self.method = method_named(job.method)
        arguments = self.method.resolve(job.parameters[output], job.merges, job.has_base)
        beside = (job.fisher, job.gram_axis if job.grams else None)
        info = TensorInfo(job.name, job.shape, job.merges, job.has_base, plan.seed, offset, extent, *beside)
        kinds = [*(spec.dtype for spec in job.inputs), job.computed_dtype]
        self._made_of = (plan, job, output, offset, extent)
        self._answered: list[tuple[Reduction, Totals]] = []  # what was requested, and sent
        super().__init__(self.method, info, arguments, kinds, rounding_key(plan, job))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it as what it was made of and sent: a method under way can't be, so it is made anew."""
        plan, *others = self._made_of
        return _made_again, (plan.for_workers, *others, [total for _, total in self._answered])

    def send(self, total: Totals) -> None:
        """Hand over the total of the requested reduction and go as far as the next request."""
        assert self.request is not None
        self._answered.append((self.request, total))
        super().send(total)

    def follow(self, other: JobMerge) -> None:
        """Take over what another output's merge of the same job was sent, as far as both have requested the same."""
        for request, total in other._answered[len(self._answered) :]:
            if request != self.request:
                return
            self.send(total)

    @property
    def is_shared(self) -> bool:
        """Whether the sums it waits for are not for one worker alone."""
        if self.request is None or self.request.held:
            return False
        return self.group is not None or self.job.numel > LARGE

    @property
    def widest_input(self) -> int:
        """Bytes of an element of the widest input."""
        return max(dtypes.size(spec.dtype) for spec in (*self.job.inputs, *self.job.grams))

    def bytes_to_sum(self, begin: int, end: int) -> int:
        """Return the bytes read for one section of the requested sums."""
        assert self.request is not None
        share = SAMPLE_EVERY if self.request.sampled else 1
        return sum(spec.stored_bytes(end - begin) for spec in self.job.inputs) // share

    def sum(self, buffers: WorkerBuffers, reader: Reader, begin: int, end: int) -> Totals:
        """Return the requested sums over one section."""
        assert self.request is not None
        ops, of = self.ops(buffers.device), self.request.of
        inputs = list(enumerate(self.job.inputs))
        if self.request.sampled:
            pieces = sample(begin, end)
            chunks = [buffers.gather(reader, number, spec, pieces) for number, spec in inputs]
            return ops.sum(of, self.block(ops, chunks), 0, sum(count for _, count in pieces))
        length = self.statistics_block
        summed = max(length, CHUNK // length * length)  # at once: on every device the same, as it decides the last bits
        room = buffers.nbytes // self.widest_input
        if room < summed:  # for many inputs; blocks are added one by one, to the same bits
            sums = (
                self._sums(buffers, reader, (first, first + some), room // length * length, length)
                for first, some in cut(begin, end, summed)
            )
            return joined(joined(of_blocks) for of_blocks in sums)
        at_once = summed if buffers.device == CPU else room // summed * summed
        return joined(self._sums(buffers, reader, (begin, end), at_once, summed))

    def _sums(
        self, buffers: WorkerBuffers, reader: Reader, section: tuple[int, int], at_once: int, summed: int
    ) -> Iterator[Totals]:
        """Yield the requested sums over ``summed`` elements each, of which ``at_once`` are read."""
        assert self.request is not None
        ops, of = self.ops(buffers.device), self.request.of
        for start, count in cut(*section, at_once):
            chunks = [buffers.read(reader, number, spec, start, count) for number, spec in enumerate(self.job.inputs)]
            block = ops.at_hand(self.block(ops, chunks))
            for first, some in cut(0, count, summed):
                part = [view[first : first + some] for view in block]
                yield ops.sum(of, part, start + first, self.statistics_block)

    def prepare(self, buffers: WorkerBuffers, reader: Reader) -> None:
        """Gather what statistics of the tensor itself are missing."""
        while self.request is not None:
            if self.request.held:
                self.send_whole(lambda number: self._whole(buffers, reader, number))
            else:
                self.send(joined(self.sum(buffers, reader, *section) for section in self.sections()))

    def _whole(self, buffers: WorkerBuffers, reader: Reader, number: int) -> torch.Tensor:
        """Return all elements of an input, in float64 on the worker's device; 0 is the base where there is one.

        Behind the inputs come the Gram matrices.
        """
        inputs = len(self.job.inputs)
        if number >= inputs:
            index, spec = 0, self.job.grams[number - inputs]
            numel = spec.numel
        else:
            index = (number - 1) % inputs if self.job.has_base else number
            spec, numel = self.job.inputs[index], self.job.numel
        whole = torch.empty(numel, dtype=torch.float64, device=buffers.device)
        for start, count in cut(0, numel, CHUNK):
            chunk = buffers.read(reader, index, spec, start, count)
            whole[start : start + count].copy_(torch.frombuffer(chunk, dtype=dtypes.torch_dtype(spec.dtype)))
            buffers.wait()
        return whole

    def block(self, ops: Ops, chunks: Sequence[memoryview]) -> list[Any]:
        """Return a backend's views of the inputs' chunks, which come in the job's order: the base first."""
        views = [ops.of_bytes(chunk, spec.dtype) for chunk, spec in zip(chunks, self.job.inputs, strict=True)]
        return [views[-1], *views[:-1]] if self.job.has_base else views


def _made_again(plan: Plan, job: Job, output: int, offset: int, extent: int, totals: Sequence[Totals]) -> JobMerge:
    merge = JobMerge(plan, job, output, offset, extent)
    for total in totals:
        merge.send(total)
    return merge


def rounding_key(plan: Plan, job: Job) -> int | None:
    """Return the key of a tensor's draws for stochastic rounding; None where the plan rounds to nearest."""
    return draws.stream_key(plan.seed, job.name) if plan.rounding == "stochastic" else None


def cast_ops(plan: Plan, job: Job, device: str = CPU) -> Ops:
    """Return the backend that casts what of a job is copied, from its first input's dtype."""
    kind = TensorKind((job.inputs[0].dtype, job.computed_dtype), rounding_key=rounding_key(plan, job))
    return ops_for(Cast(), kind, device)


def needs_torch(plan: Plan, job: Job, merges: Sequence[JobMerge]) -> bool:
    """Return whether torch has a part in making a tensor on the CPU, as far as can be told before its statistics."""
    copies = job.merged_elements < job.numel
    casts = copies and any(spec.dtype != job.dtype for spec in job.inputs[:1])  # scales have no input
    return (
        bool(job.scales or job.scales_of)
        or any(merge.ops(CPU).needs_torch for merge in merges)
        or (casts and cast_ops(plan, job).needs_torch)
        or (copies and finite_needs_torch(job.dtype))
        or any(spec.encoding.needs_torch(spec) for spec in job.inputs)
    )


def needed(merges: Mapping[tuple[int, int], JobMerge], jobs: Collection[int]) -> dict[tuple[int, int], JobMerge]:
    """Return the merges of some jobs, and those whose sums they wait for: all tensors of their groups."""
    groups = {merge.group for (job, _), merge in merges.items() if job in jobs} - {None}
    return {key: merge for key, merge in merges.items() if key[0] in jobs or merge.group in groups}


def gather(merges: Sequence[JobMerge], sum_sections: Callable[[Sequence[Section]], Mapping[Section, Totals]]) -> None:
    """Gather the sums that span several tensors, and those of large tensors, which are work for several workers.

    ``sum_sections`` returns the sums over some sections; where they are counts, one sum for all sections of a group.
    """
    while waiting := [number for number, merge in enumerate(merges) if merge.is_shared]:
        leaders = _leaders(merges, waiting)
        asking = [number for number in waiting if leaders[number] == number]
        sections = [[(number, *section) for section in merges[number].sections()] for number in asking]
        sums = sum_sections([section for of_merge in sections for section in of_merge])
        parts = [[sums[section] for section in of_merge if section in sums] for of_merge in sections]
        send_totals([merges[number] for number in asking], parts)
        for number in waiting:
            if number not in asking:
                merges[number].follow(merges[leaders[number]])


def _leaders(merges: Sequence[JobMerge], waiting: Sequence[int]) -> dict[int, int]:
    """Return for each merge the first one, maybe itself, that asks for the same sums of the same job alone."""
    leaders: dict[int, int] = {}
    of_job: dict[int, list[int]] = {}
    for number in waiting:
        merge = merges[number]
        same = of_job.setdefault(id(merge.job), [])
        alike = (first for first in same if merge.group is None and merges[first].request == merge.request)
        leaders[number] = next(alike, number)
        same.append(number)
    return leaders


class FewCounts(NamedTuple):
    """Counts of which most are 0, as those of a sample's bit patterns are: of the others where each is, and it."""

    shape: tuple[int, ...]
    places: Any
    counts: Any


class Sums(dict[Section, "Totals | FewCounts"]):
    """Sums by section. Those of a task may travel to another process: there they arrive without zeros of counts."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Sums, ({section: _without_zeros(part) for section, part in self.items()},)


def _without_zeros(part: Totals | FewCounts) -> Totals | FewCounts:
    """Return counts of which less than a quarter aren't 0 as few ones; what else there is as it is."""
    if isinstance(part, FewCounts) or part.dtype.kind != "i":
        return part
    places = np.flatnonzero(part)
    return FewCounts(part.shape, places, part.ravel()[places]) if 4 * len(places) < part.size else part


def add_to(sums: dict[Section, Any], part: Totals | FewCounts, section: Section, first: Section) -> None:
    """Add the sum over a section of a group of tensors, whose first section is ``first``, to all that are known.

    Counts are added up at once: there may be a hundred thousand of them for each tensor, and in whatever order they
    are added, their sum is the same. Sums of floats are kept apart until they can be added in the plan's order.
    """
    if isinstance(part, FewCounts):
        known = sums.setdefault(first, np.zeros(part.shape, np.int64))
        known.flat[part.places] += part.counts
        return
    key = first if part.dtype.kind == "i" else section
    if key in sums:
        sums[key] += part
    else:
        sums[key] = part
