"""How a plan is cut: tasks ▸ spans ▸ chunks ▸ blocks ▸ grains.

task: what one worker takes at a time: a span, the spans of small tensors that lie side by side, or all of a tensor.
span: what is journalled and digested. Its length is part of the output's manifest, so it is fixed.
chunk: what is read and written at once. A page-cache write of 2 MB costs half of one of 256 kB (measured: 6.8 against
    3.8 GB/s). Where very many inputs are read side by side it is shorter, so that memory stays bounded.
block: what is computed at once, small enough for its temporaries to stay in cache.
grain: what one partial sum covers.

No output byte depends on chunks and blocks: any multiples of the grain will do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mergekit_lite import block_fp8
from mergekit_lite.planning import Job, Plan

SPAN = 1 << 23
TASK = 1 << 20  # elements; spans of small tensors are taken together until they have so many
TASKS = 256  # in a small model fewer elements, so that there are so many tasks
CHUNK = 1 << 20
SHORTEST = 1 << 18  # elements of a chunk; so many a sample of a section has
BUFFERS = 1 << 25  # bytes of a worker's buffers, beyond which chunks are shorter: those of 15 inputs of 16 bits
BLOCK = 1 << 17
GRAIN = 1 << 15
OBSERVED_WHOLE = 1 << 26  # elements; observing up to so many takes less than a tenth of the process's time
SAMPLED = 64  # in larger models every sixty-fourth grain of a tensor is observed, the first one always


@dataclass(frozen=True, slots=True)
class Span:
    """The elements ``begin … end`` of one job; ``merged`` says whether they go through the method.

    ``offset`` is the number of elements in the tensors before the job's; ``scales`` are the index and the job of the
    scales that are made with FP8 codes.
    """

    index: int
    job: Job
    offset: int
    begin: int
    end: int
    merged: bool
    scales: tuple[int, Job] | None = None


def spans(plan: Plan, only: Collection[int] | None = None) -> Iterator[list[Span]]:
    """Yield the spans of each job, in the order of the output's bytes; ``only`` of the jobs with these indices."""
    codes_to_scales = {job.scales_of: (index, job) for index, job in enumerate(plan.jobs) if job.scales_of}
    offset = 0
    for index, job in enumerate(plan.jobs):
        merged = job.merged_elements
        if not job.scales_of and (only is None or index in only):
            scales = codes_to_scales.get(job.name)
            yield [
                Span(index, job, offset, begin, end, end <= merged, scales)
                for begin, end in bounds(job.numel, merged, job.dtype)
            ]
        offset += job.numel


def bounds(numel: int, merged: int, dtype: str) -> Iterator[tuple[int, int]]:
    """Yield the (begin, end) of each span of a tensor whose first ``merged`` elements go through a method.

    FP8 codes and their scales are one span each: so nobody needs to know where blocks begin.
    """
    span = max(numel, 1) if dtype == block_fp8.CODES else SPAN
    for first, last in ((0, merged), (merged, numel)):
        for begin in range(first, last, span):
            yield begin, min(begin + span, last)


def joined_elements(extent: int) -> int:
    """Return the elements that spans of small tensors are joined to, in a plan of ``extent`` elements."""
    return min(TASK, extent // TASKS)


def longest_chunk(plan: Plan) -> int:
    """Return how many elements are read and written at once, as far as no job or block needs more."""
    fitting = BUFFERS // ((plan.most_inputs + 1) * plan.widest_element)
    return min(CHUNK, max(SHORTEST, fitting // BLOCK * BLOCK))


def quantised_at_once(job: Job) -> int:
    """Return the elements of a quantised job that a chunk is a multiple of: whole rows of blocks, and whole grains."""
    stripe = block_fp8.EDGE * job.shape[-1]
    return math.lcm(stripe, GRAIN)


def cut(begin: int, end: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, count) of each piece of ``begin … end``, all but the last ``length`` long."""
    for start in range(begin, end, length):
        yield start, min(length, end - start)


def observed_share(plan: Plan) -> int:
    """Return one grain in how many is observed: every one where that costs little, else a fixed sample."""
    return 1 if sum(job.merged_elements for job in plan.jobs) <= OBSERVED_WHOLE else SAMPLED


def observed_grains(begin: int, start: int, count: int, share: int) -> Iterator[slice]:
    """Yield the grains of a block that are observed, as slices of it; grains are counted from the span's begin."""
    for grain in range((start - begin) // GRAIN, -(-(start - begin + count) // GRAIN)):
        if grain % share == 0:
            first = grain * GRAIN - (start - begin)
            yield slice(first, min(first + GRAIN, count))
