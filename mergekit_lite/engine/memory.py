"""How much memory a run will take: known before it starts, and not a function of the model's size."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable, Iterator, Sequence

from mergekit_lite.checkpoint.encodings.sum import Sum
from mergekit_lite.checkpoint.stores.read_ahead import PER_READER
from mergekit_lite.engine.fetching import fetches
from mergekit_lite.engine.pool import writing_workers
from mergekit_lite.engine.run import workers_and_block
from mergekit_lite.engine.span_writer import chunk_of
from mergekit_lite.engine.tensor_merge import JobMerge, needs_torch
from mergekit_lite.engine.tiling import BLOCK, CHUNK, longest_chunk
from mergekit_lite.methods.contract import Reduction
from mergekit_lite.object_stores import Place
from mergekit_lite.ops import CPU
from mergekit_lite.ops import operations as op
from mergekit_lite.output.upload import IN_FLIGHT
from mergekit_lite.planning import Job, Plan

NUMBER = re.compile(r"\d+")
PYTHON, WITH_TORCH = 34_000_000, 260_000_000  # measured on Linux
NUMPY = 11_000_000  # measured: it is imported for statistics, by torch too
COUNTING = 5_000_000  # of each model, for each worker: bit patterns counted to find a threshold; measured
BY_TORCH, COUNTED_BY_TORCH = 15_000_000, 30_000_000  # for each worker: what torch keeps and copies, and where it counts
WITH_CUDA = 900_000_000  # not measured: torch's CUDA build, and a context, of which the host keeps a part
TEMPORARIES = 6  # widened inputs, result and intermediate tensors of one block, of 8-byte elements at most
UPLOADING = IN_FLIGHT + 40_000_000  # parts under way, and the client of the store
DOUBLE = 8  # bytes of a number of a matrix that a worker holds whole
QUANTISING = 20  # bytes for each element of a chunk that is quantised: sizes, quotients, codes, what they stand for
FOLDING = 5 * 8 << 20  # base, product and factors in float64 of one piece to which something is added, for each worker
REMEMBERED_FACTORS = 64 << 20
PER_TENSOR = 3_000  # the plan, the tasks and the journal; measured: 2,000 for two models


def memory_estimate(plan: Plan, threads: int | None, devices: Sequence[str] = (CPU,)) -> int:
    """Return the bytes of the host's resident memory that a run is expected to take at most.

    On GPUs nearly all of it is pinned. ``threads`` are as for ``run``.
    """
    workers, block = workers_and_block(devices, threads, writing_workers())
    on_cpu = CPU in devices
    chunk = max((chunk_of(job, longest_chunk(plan)) for job in _of_each_kind(plan)), default=CHUNK)
    buffers = (plan.most_inputs + 1) * chunk * plan.widest_element + TEMPORARIES * BLOCK * 8
    buffers += QUANTISING * chunk if any(job.scales for job in plan.jobs) else 0
    if not on_cpu:
        buffers = pinned_bytes(plan, block)
    folds = any(isinstance(spec.encoding, Sum) for job in plan.jobs for spec in job.inputs)
    factors = REMEMBERED_FACTORS if folds else 0
    buffers += FOLDING if folds else 0
    buffers += PER_READER if fetches(plan) else 0
    by_torch = on_cpu and _needs_torch(plan)
    runtime = WITH_CUDA if not on_cpu else WITH_TORCH if by_torch else PYTHON
    statistics = {type(request.of) for request in _requests(plan)}
    runtime += NUMPY if statistics and runtime == PYTHON else 0
    counts = op.CountUpperBits in statistics and on_cpu
    buffers += COUNTING * plan.most_inputs if counts else 0
    buffers += by_torch * (BY_TORCH + COUNTED_BY_TORCH * counts)
    buffers += DOUBLE * most_held(plan) if on_cpu else 0
    runtime += UPLOADING if any(isinstance(output, Place) for output in plan.outputs) else 0
    return runtime + factors + workers * buffers + PER_TENSOR * len(plan.jobs)


def pinned_bytes(plan: Plan, block: int) -> int:
    """Return the bytes of the buffers of one worker with a GPU, which computes ``block`` elements at once."""
    rows = max((JobMerge(plan, job, 0, 0, job.numel).row for job in plan.merged), default=0)
    return (plan.most_inputs + 1) * ((max(block, CHUNK) + 2 * rows) * plan.widest_element + mmap.PAGESIZE)


def _needs_torch(plan: Plan) -> bool:
    """Return whether a tensor needs torch."""
    return any(
        needs_torch(plan, job, [JobMerge(plan, job, 0, 0, job.numel)] if job.merged_elements else [])
        for job in _of_each_kind(plan)
    )


def _requests(plan: Plan) -> Iterator[Reduction]:
    """Yield the statistics that methods ask for first."""
    for job in _of_each_kind(plan):
        if job.merged_elements and (request := JobMerge(plan, job, 0, 0, job.numel).request) is not None:
            yield request


def most_held(plan: Plan) -> int:
    """Return the most numbers of float64 that a worker holds of a tensor that its method needs whole."""
    # Layers are alike: one of them is enough.
    alike = {(job.method, job.shape, NUMBER.sub("", job.name)): job for job in plan.merged}
    requests = [JobMerge(plan, job, 0, 0, job.numel).request for job in alike.values()]
    return max((request.held for request in requests if request is not None), default=0)


def _of_each_kind(plan: Plan) -> Iterable[Job]:
    """Return the first job of each kind."""
    first: dict[object, Job] = {}
    for job in plan.jobs:
        first.setdefault((job.method, job.dtype, *(spec.dtype for spec in job.inputs)), job)
    return first.values()
