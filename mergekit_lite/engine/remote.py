"""Outputs in object stores, as a run needs them: workspaces, what is left to make, the room of spools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from contextlib import ExitStack

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.extents import files_of
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.stores.addresses import is_elsewhere
from mergekit_lite.checkpoint.stores.remote_file import is_strong
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.engine.processes import AHEAD
from mergekit_lite.engine.schedule import expect_elements
from mergekit_lite.engine.tensor_merge import LARGE, JobMerge
from mergekit_lite.engine.tiling import CHUNK, bounds, cut
from mergekit_lite.errors import RunError, listing
from mergekit_lite.object_stores import Place
from mergekit_lite.output.companions import companion_names
from mergekit_lite.output.journal import Journal, Record
from mergekit_lite.output.remote_target import partial
from mergekit_lite.output.remote_workspace import WINDOW, Part, RemoteWorkspace
from mergekit_lite.output.working_folder import WorkingFolder
from mergekit_lite.output.workspace import OutputWorkspace
from mergekit_lite.planning import Job, Plan


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
    return [(job.name, record.begin * size, _end_of(job, record.begin) * size, record.output)]


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

    An input is trusted where path, size and time are those of then, and one elsewhere where its etag is. Another etag
    is refused. Of any other input, as on another machine or from a server without etags, the bytes decide: those that
    went into finished files are held to the digest of each span. What goes into other files is read anyway. Only
    statistics over several tensors can't be checked so, as they may be of bytes that no journal tells of.
    """
    if not workspace.settled:
        return
    files = {str(file.path): file for source in plan.inputs for file in source.files_read}
    with_etag = {path for path, file in files.items() if is_elsewhere(path) and is_strong(file.etag)}
    without = {path for path in files if is_elsewhere(path)} - with_etag
    unproven = workspace.changed_sources | without
    title = "inputs that are not those of the run that was stopped; --force starts over"
    others = unproven & with_etag
    if unproven and not others and _has_statistics_of_groups(plan):
        title = (
            "finished files hold statistics over several tensors, of inputs with other paths or times now. Give these "
            "the paths and times that they had (cp -p, rsync -a); --force starts over"
        )
        others = unproven
    if unproven and not others:
        others = _others_by_digest(plan, workspace.journal, unproven)
    if others:
        raise RunError(listing(f"{partial(workspace.place)}: {title}", sorted(others)))


def _has_statistics_of_groups(plan: Plan) -> bool:
    """Return whether some tensor's merge needs figures over other tensors as well."""
    return any(
        JobMerge(plan, job, output, 0, job.numel).group is not None
        for job in plan.jobs
        if job.merged_elements
        for output in range(len(plan.outputs))
    )


def _others_by_digest(plan: Plan, journal: Journal, unproven: Set[str]) -> set[str]:
    """Return those of some files that have other bytes, in the spans of a journal, than they had."""
    others: set[str] = set()
    with Reader() as reader:
        for record in journal.values():
            job = plan.jobs[record.job]
            end = _end_of(job, record.begin)
            for spec, known in zip(job.inputs, record.inputs, strict=False):  # of a copy the first one is read
                files = {str(file) for file in files_of(spec)} & unproven
                if files - others and _digest_of(reader, spec, record.begin, end) != known:
                    others |= files
    return others


def _digest_of(reader: Reader, spec: TensorSpec, begin: int, end: int) -> str:
    """Return the digest of the elements ``begin … end`` of a tensor, as records hold it."""
    digest = xxhash.xxh3_128()
    expect_elements(reader, [([spec], begin, end)])
    for start, count in cut(begin, end, CHUNK):
        chunk = memoryview(bytearray(count * dtypes.size(spec.dtype)))
        spec.fill(reader, start, chunk)
        digest.update(chunk)
    return digest.hexdigest()


def _end_of(job: Job, begin: int) -> int:
    """Return the end of the span of a job that begins at an element."""
    return next(end for first, end in bounds(job.numel, job.merged_elements, job.dtype) if first == begin)
