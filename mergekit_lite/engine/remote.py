"""Outputs in object stores, as a run needs them: workspaces, what is left to make, the room of spools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.stores.addresses import is_elsewhere
from mergekit_lite.engine.processes import AHEAD
from mergekit_lite.engine.tensor_merge import LARGE
from mergekit_lite.engine.tiling import CHUNK, bounds, cut
from mergekit_lite.errors import RunError, listing
from mergekit_lite.object_stores import Place
from mergekit_lite.output.companions import companion_names
from mergekit_lite.output.journal import Record
from mergekit_lite.output.remote_target import partial
from mergekit_lite.output.remote_workspace import WINDOW, Part, RemoteWorkspace
from mergekit_lite.output.working_folder import WorkingFolder
from mergekit_lite.output.workspace import OutputWorkspace
from mergekit_lite.planning import Plan

TELLING = 1 << 16  # elements of a span that is bound to differ where a model was trained on


def opened_workspace(
    plan: Plan, number: int, stack: ExitStack, *, resume: bool, force: bool, crew: bool = False
) -> OutputWorkspace:
    """Return the workspace of the plan's output ``number``, on a disk or in an object store. Raises RunError.

    What it needs open is closed by the ``stack``. ``crew`` says that workers of a cluster make it.
    """
    output, names = plan.outputs[number], companion_names(plan, number)
    if not isinstance(output, Place):
        folder = stack.enter_context(WorkingFolder(output, fresh=force and not resume))
        return OutputWorkspace(folder, plan.layout, plan.digest(number), plan.input_files, names)
    workspace = RemoteWorkspace(
        output,
        plan.layout,
        plan.digest(number),
        plan.input_files,
        names,
        lambda record: parts_of(plan, record),
        resume=resume,
        force=force,
        together=len(plan.outputs),
        crew=crew,
    )
    try:
        _check_sources(plan, workspace)
    except BaseException:
        workspace.close()
        raise
    return workspace


def parts_of(plan: Plan, record: Record) -> Sequence[Part]:
    """Return which bytes of which tensor a span's record tells of."""
    job = plan.jobs[record.job]
    size = dtypes.size(job.dtype)
    end = next(end for begin, end in bounds(job.numel, job.merged_elements, job.dtype) if begin == record.begin)
    return [(job.name, record.begin * size, end * size, record.output)]


def jobs_left(plan: Plan, workspaces: Iterable[OutputWorkspace]) -> set[int] | None:
    """Return the indices of the jobs that some output still needs; None for all, where none was finished earlier.

    What lies on this machine is looked at span by span; of a file in a store it is known.
    """
    settled = [workspace.settled if isinstance(workspace, RemoteWorkspace) else set() for workspace in workspaces]
    done = set.intersection(*settled) if settled else set()
    if not done:
        return None
    return {
        index
        for index, job in enumerate(plan.jobs)
        if any(plan.layout.place(name)[0] not in done for name in (job.name, job.scales) if name)
    }


def spool_bytes(plan: Plan, workers: int) -> int:
    """Return the bytes of this machine's disk that outputs in object stores take at most while they are made."""
    remote = sum(isinstance(output, Place) for output in plan.outputs)
    if not remote:
        return 0
    if any(job.scales for job in plan.jobs):  # a file's scales lie before its codes, and are made with them
        unsent = 2 * max(file.size for file in plan.layout.files)
    else:
        largest = max((min(job.numel, LARGE) * dtypes.size(job.dtype) for job in plan.jobs), default=0)
        unsent = WINDOW // remote + workers * (1 + AHEAD) * largest
    return remote * min(unsent, plan.layout.nbytes)


def _check_sources(plan: Plan, workspace: RemoteWorkspace) -> None:
    """Raise RunError where an input is not the one that finished files were made of.

    Where paths, sizes or times are others, as on another machine, bytes decide: those of one span that each finished
    file has of each input.
    """
    chosen: dict[tuple[str, int, int], tuple[int, int, Record]] = {}
    for key in workspace.journal if workspace.changed_sources else ():
        record = workspace.journal[key]
        job = plan.jobs[record.job]
        file = plan.layout.place(job.name)[0]
        end = next(end for begin, end in bounds(job.numel, job.merged_elements, job.dtype) if begin == record.begin)
        for number, spec in enumerate(job.inputs[: len(record.inputs)]):
            place, size = (str(spec.file), job.models[number], file), end - record.begin
            if place not in chosen or _tells_more(size, chosen[place][0]):
                chosen[place] = (size, number, record)
    # An etag is the same from everywhere: where it is another one, no bytes need to be looked at.
    changed = dict.fromkeys(sorted(path for path in workspace.changed_sources if is_elsewhere(path)))
    with Reader() as reader:
        for (path, *_), (size, number, record) in chosen.items() if not changed else ():
            spec = plan.jobs[record.job].inputs[number]
            digest = xxhash.xxh3_128()
            for start, count in cut(record.begin, record.begin + size, CHUNK):
                chunk = memoryview(bytearray(count * dtypes.size(spec.dtype)))
                spec.fill(reader, start, chunk)
                digest.update(chunk)
            if digest.hexdigest() != record.inputs[number]:
                changed[path] = None
    if changed:
        title = (
            f"{partial(workspace.place)}: inputs that are not those of the run that was stopped; --force starts over"
        )
        raise RunError(listing(title, list(changed)))


def _tells_more(size: int, other: int) -> bool:
    """Return whether a span of a size is a better one to look at: large enough to differ, and quickly read."""
    return other > size >= TELLING or other < min(size, TELLING)
