"""How much memory a run will take: known before it starts, and not a function of the model's size."""

from __future__ import annotations

from mergekit_lite.checkpoint.encodings.sum import Sum
from mergekit_lite.engine.tensor_merge import JobMerge, needs_torch
from mergekit_lite.engine.tiling import BLOCK, CHUNK
from mergekit_lite.planning import Job, Plan

PYTHON, WITH_TORCH = 45_000_000, 300_000_000  # measured on Linux
TEMPORARIES = 6  # widened inputs, result and intermediate tensors of one block, of 8-byte elements at most
FOLDING = 5 * 8 << 20  # base, product and factors in float64 of one piece to which something is added, for each worker
REMEMBERED_FACTORS = 64 << 20
PER_TENSOR = 3_000  # the plan, the tasks and the journal; measured: 2,000 for two models


def memory_estimate(plan: Plan, threads: int | None) -> int:
    """Return the bytes of resident memory that a run on the CPU is expected to take at most."""
    from mergekit_lite.engine.pool import writing_workers

    buffers = (plan.most_inputs + 1) * CHUNK * plan.widest_element + TEMPORARIES * BLOCK * 8
    folds = any(isinstance(spec.encoding, Sum) for job in plan.jobs for spec in job.inputs)
    factors = REMEMBERED_FACTORS if folds else 0
    buffers += FOLDING if folds else 0
    runtime = WITH_TORCH if _needs_torch(plan) else PYTHON
    return runtime + factors + (threads or writing_workers()) * buffers + PER_TENSOR * len(plan.jobs)


def _needs_torch(plan: Plan) -> bool:
    """Return whether a tensor needs torch, looking at the first one of each kind."""
    first: dict[object, Job] = {}
    for job in plan.jobs:
        first.setdefault((job.method, job.dtype, *(spec.dtype for spec in job.inputs)), job)
    return any(
        needs_torch(job, [JobMerge(plan, job, 0, 0, job.numel)] if job.merged_elements else [])
        for job in first.values()
    )
