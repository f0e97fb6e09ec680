"""What a tensor costs: measured with the engine itself, on made-up tensors of each kind that a plan has.

So there is no table of methods and dtypes to keep true: whatever a method does, in C or in torch, with whatever
encoding it is read and written, is what is measured. Three sizes tell the cost of any: those below 256 Ki elements are
not sampled, and all have a part that doesn't depend on size.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.fused import MadeByJob
from mergekit_lite.engine.pool import tuned_process
from mergekit_lite.engine.span_writer import SpanWriter, chunk_of
from mergekit_lite.engine.tensor_merge import JobMerge, needs_torch
from mergekit_lite.engine.tiling import BLOCK, CHUNK, Span
from mergekit_lite.methods.tensor_merge import joined
from mergekit_lite.planning import Job, Plan
from mergekit_lite.prediction.made_up import MadeUpReader, made_up

SIZES = (1 << 10, 1 << 18, 1 << 21)  # elements
TIMES, MOST_TIMES = 3, 20  # that each is measured, after once to warm up; the median counts
LONG_ENOUGH = 0.02  # seconds of processor time, after which the least number of times will do
STEPS = 20_000  # of a loop in Python, timed at once
MOST_KINDS = 12  # that are measured, those with the most elements first


class Point(NamedTuple):
    """A made-up tensor: its elements, seconds of processor time, and bytes read for its statistics."""

    elements: int
    merging: float
    statistics: float
    read_again: float


@dataclass(frozen=True)
class Cost:
    """What the tensors of one kind cost.

    Attributes:
        points: the made-up tensors, by their size.
        has_statistics: whether the method looks at the whole tensor before it merges it.
        group: whether it looks at a group of tensors before it merges the first of them.
    """

    points: tuple[Point, ...]
    has_statistics: bool = False
    group: bool = False

    def of(self, elements: int) -> Point:
        """Return what a tensor of this size costs: between two points and beyond the last in a straight line."""
        if len(self.points) < 2:
            return self.points[0]
        parts = list(pairwise(self.points))
        low, high = next((part for part in parts if elements <= part[1].elements), parts[-1])
        share = (elements - low.elements) / (high.elements - low.elements)
        return Point(elements, *(max(0.0, a + share * (b - a)) for a, b in zip(low[1:], high[1:], strict=True)))


def kind_of(job: Job) -> Hashable:
    """Return what the cost of an element of a job depends on: of numbers only whether they are 0, 1 or others."""
    inputs = tuple([(spec.dtype, _encodings(spec)) for spec in job.inputs])
    numbers = tuple([tuple([(key, _told(value)) for key, value in each.items()]) for each in job.parameters])
    return job.method, numbers, inputs, job.has_base, job.dtype, bool(job.scales), bool(job.merged_elements)


def _encodings(spec: TensorSpec) -> Hashable:
    if isinstance(spec.encoding, MadeByJob):
        return kind_of(spec.encoding.job)
    return type(spec.encoding).__name__, spec.stored_dtype, spec.encoding.block


def _told(value: Any) -> Hashable:
    if isinstance(value, tuple):
        return tuple([_told(each) for each in value])
    return value if value in (0, 1) or not isinstance(value, float | int) else "number"


@dataclass(frozen=True)
class Costs:
    """What the jobs of a plan cost.

    Attributes:
        kinds: of each job; None for scales, which are made with their codes.
        of_kind: the cost of each.
        importing: seconds that torch's import took, where it is needed; none where it had been imported before.
        step: seconds of processor time that a loop in Python takes for a step.
        needs_torch: whether it is.
    """

    kinds: list[Hashable]
    of_kind: dict[Hashable, Cost]
    importing: float
    step: float
    needs_torch: bool = False


def measured_costs(plan: Plan) -> Costs:
    """Measure what a plan's jobs cost.

    Kinds beyond the first few, which have the fewest elements, take the cost of the last of those.
    """
    kinds = [None if job.scales_of else kind_of(job) for job in plan.jobs]
    of_kind: dict[Hashable, Job] = {}
    elements: dict[Hashable, int] = {}
    for job, kind in zip(plan.jobs, kinds, strict=True):
        if kind is not None:
            elements[kind] = elements.get(kind, 0) + job.numel
            if kind not in of_kind or job.numel > of_kind[kind].numel:
                of_kind[kind] = job
    common = sorted(of_kind, key=lambda kind: -elements[kind])
    chosen = common[:MOST_KINDS]
    started = time.process_time()
    torch_needed = any(
        needs_torch(plan, job, [JobMerge(plan, job, v, 0, job.numel) for v in _outputs(plan, job)])
        for job in map(of_kind.__getitem__, chosen)
    )
    if torch_needed:
        import torch  # noqa: F401
    importing = time.process_time() - started
    reader = MadeUpReader(plan.most_inputs)
    with tuned_process(torch_needed), reader:
        writer = SpanWriter(plan, BLOCK)
        costs = {kind: _cost(plan, of_kind[kind], writer, reader) for kind in chosen}
    rare = dict.fromkeys(common[MOST_KINDS:], costs[chosen[-1]] if chosen else Cost(()))
    return Costs(kinds, costs | rare, importing, python_step(), torch_needed)


def python_step() -> float:
    """Return the seconds of processor time that a loop in Python takes for a step, here and now.

    What a run does besides arithmetic on weights is told in steps; their pace is the machine's, and its neighbours'.
    """
    tries = []
    for _ in range(MOST_TIMES):
        started = time.thread_time()
        for _ in range(STEPS):
            pass
        tries.append(time.thread_time() - started)
    return sorted(tries)[MOST_TIMES // 2] / STEPS


def _outputs(plan: Plan, job: Job) -> range:
    return range(len(plan.outputs) if job.merged_elements else 0)


def _cost(plan: Plan, job: Job, writer: SpanWriter, reader: MadeUpReader) -> Cost:
    """Measure a kind; as if it were plain where made-up bytes make no sense to an encoding, as those of indices."""
    try:
        return _measured(plan, job, writer, reader)
    except Exception:
        return _measured(plan, job, writer, reader, plainly=True)


def _measured(plan: Plan, job: Job, writer: SpanWriter, reader: MadeUpReader, *, plainly: bool = False) -> Cost:
    points: dict[int, Point] = {}
    requests = []
    for size in SIZES:
        small = made_up(job, size, reader, plainly=plainly)
        if small.numel in points:
            continue
        nbytes = (max(chunk_of(small, writer.chunk), CHUNK) + 2 * (small.shape[-1] if small.shape else 1)) * 8
        buffers = WorkerBuffers(CPU, len(small.inputs), nbytes)
        merges = [JobMerge(plan, small, v, 0, small.numel) for v in _outputs(plan, job)]
        requests = [merge.request for merge in merges if merge.request is not None]
        _once(plan, small, writer, buffers, reader)
        tries: list[Point] = []
        while len(tries) < TIMES or (len(tries) < MOST_TIMES and sum(map(_seconds, tries)) < LONG_ENOUGH):
            tries.append(_once(plan, small, writer, buffers, reader))
        points[small.numel] = sorted(tries, key=_seconds)[len(tries) // 2]
    group = any(request.group is not None for request in requests)
    return Cost(tuple(points[size] for size in sorted(points)), bool(requests), group)


def _seconds(point: Point) -> float:
    return point.merging + point.statistics


def _once(plan: Plan, job: Job, writer: SpanWriter, buffers: WorkerBuffers, reader: MadeUpReader) -> Point:
    """Make a made-up job once, as a worker does."""
    sinks = {v: reader.sink() for v in range(len(plan.outputs))}
    reader.next_job()
    scales = (0, job) if job.scales else None
    span = Span(0, job, 0, 0, job.numel, bool(job.merged_elements), scales)
    read = reader.nbytes
    started, copied, left_out = time.thread_time(), reader.seconds, reader.uncounted
    merges = {v: JobMerge(plan, job, v, 0, job.numel) for v in _outputs(plan, job)}
    for merge in merges.values():
        _prepare(merge, buffers, reader)
    statistics = time.thread_time() - started - (reader.seconds - copied) - (reader.uncounted - left_out)
    read_again = reader.nbytes - read
    started, copied = time.thread_time(), reader.seconds
    writer.make(buffers, reader, span, merges, sinks, lambda: False)
    merging = time.thread_time() - started - (reader.seconds - copied)
    return Point(job.numel, merging, statistics, read_again)


def _prepare(merge: JobMerge, buffers: WorkerBuffers, reader: MadeUpReader) -> None:
    """Gather a merge's statistics.

    Of a group of tensors, the passes that look for the last of equal numbers visit a few tensors of a whole model: they
    don't count here.
    """
    while (request := merge.request) is not None:
        if request.held:
            merge.prepare(buffers, reader)
            break
        started, copied, read = time.thread_time(), reader.seconds, reader.nbytes
        total = joined(merge.sum(buffers, reader, *section) for section in merge.sections())
        if request.group is not None and request.within is not None:
            reader.uncounted += time.thread_time() - started - (reader.seconds - copied)
            reader.nbytes = read
        merge.send(total)
