"""How much of a plan's inputs is fetched from elsewhere, and what of it more than once: known before it starts."""

from __future__ import annotations

from typing import NamedTuple

from mergekit_lite.checkpoint.extents import is_elsewhere, is_elsewhere_file
from mergekit_lite.checkpoint.stores.read_ahead import ROOM, room_of
from mergekit_lite.engine.tensor_merge import JobMerge
from mergekit_lite.planning import Job, Plan


class Fetches(NamedTuple):
    """Bytes."""

    bytes: int = 0  # of the tensors that lie elsewhere
    again: int = 0  # of them those that are fetched for statistics first, and once more to be merged

    def __bool__(self) -> bool:
        return self.bytes > 0


def fetches(plan: Plan) -> Fetches:
    """Return what is fetched for a plan; nothing where all inputs are on this machine.

    A tensor's statistics are taken in passes of their own. It is fetched for each, unless a worker has room for it.
    """
    nbytes = again = 0
    if not any(is_elsewhere_file(file.path) for source in plan.inputs for file in source.files_read):
        return Fetches()
    for job in plan.jobs:
        sizes = [spec.nbytes for spec in job.inputs if is_elsewhere(spec)]
        nbytes += sum(sizes)
        if sizes and job.merged_elements and _is_read_again(plan, job, sum(map(room_of, sizes))):
            again += sum(sizes)
    return Fetches(nbytes, again)


def _is_read_again(plan: Plan, job: Job, room: int) -> bool:
    merges = [JobMerge(plan, job, output, 0, job.numel) for output in range(len(plan.outputs))]
    return any(merge.request is not None and (merge.is_shared or room > ROOM) for merge in merges)
