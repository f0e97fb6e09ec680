"""Recognition of an output that is finished: by its bytes, as a manifest only describes them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.engine.report import of_spans
from mergekit_lite.engine.tiling import bounds
from mergekit_lite.errors import UnreadableError
from mergekit_lite.layout import is_single_file
from mergekit_lite.object_stores import Place
from mergekit_lite.output.journal import plan_of
from mergekit_lite.output.manifest import READ_BYTES, files_read, frame_of
from mergekit_lite.output.publishing import is_published, own_manifests
from mergekit_lite.output.remote_target import (
    RemoteFolder,
    finished_files,
    is_published_remotely,
    partial,
    remote_manifest,
)
from mergekit_lite.output.working_folder import left_by_earlier_run
from mergekit_lite.planning import Job, Plan


def is_finished(plan: Plan, number: int, *, force: bool, sync: bool) -> bool:
    """Return True where this very plan made what has the name of its output ``number``.

    Every byte is read. What a kill kept from being done is finished, as ``is_published`` says. Raises RunError.
    """
    output = plan.outputs[number]
    if isinstance(output, Place):
        names = [output.name if is_single_file(output) else file.name for file in plan.layout.files]
        files = dict(zip(names, (file.size for file in plan.layout.files), strict=True))
        newest = max((time for _, _, time in plan.input_files), default=0)
        if not _is_of_the_same_etags(plan, remote_manifest(output) or {}):
            return False
        return is_published_remotely(output, plan.digest(number), files, newest)
    describes = functools.partial(_describes, plan, output)
    return is_published(output, plan.digest(number), plan.input_files, describes, force=force, sync=sync)


def may_be_finished(plan: Plan, number: int) -> bool:
    """Return whether a manifest calls an output the plan's own; see ``is_finished``. Raises RunError."""
    output, digest = plan.outputs[number], plan.digest(number)
    if isinstance(output, Place):
        return (remote_manifest(output) or {}).get("plan") == digest
    return any(own_manifests(output, digest, plan.input_files))


def is_begun(plan: Plan) -> bool:
    """Return whether an earlier run of this very plan left its work on its first output, unfinished."""
    output, digest = plan.outputs[0], plan.digest(0)
    if isinstance(output, Place):
        return any(file.head.get("plan") == digest for _, file in finished_files(RemoteFolder(partial(output))))
    with left_by_earlier_run(output) as folder:
        return folder is not None and plan_of(folder.journal) == digest


def _describes(plan: Plan, output: Path, manifest: Mapping[str, Any]) -> bool:
    """Return whether the weights under an output's name are those that a manifest of its plan describes."""
    paths = [output if is_single_file(output) else output / file.name for file in plan.layout.files]
    jobs = {job.name: job for job in plan.jobs}
    if not _is_of_the_same_etags(plan, manifest):
        return False
    try:
        # Sizes and headers first: a few reads tell most of what is something else.
        for path, file, recorded in zip(paths, plan.layout.files, manifest["files"], strict=True):
            if path.stat().st_size != file.size or frame_of(plan.layout, path, file) != recorded["frame_xxh3_128"]:
                return False
        for path, file in zip(paths, plan.layout.files, strict=True):
            with path.open("rb") as content:
                for tensor in file.tensors:
                    content.seek(plan.layout.place(tensor.name)[1])
                    if _digest(content, jobs[tensor.name]) != manifest["tensors"][tensor.name]["output"]:
                        return False
    except (OSError, UnreadableError, LookupError, TypeError, ValueError):  # missing files, or a manifest that changed
        return False
    return True


def _is_of_the_same_etags(plan: Plan, manifest: Mapping[str, Any]) -> bool:
    """Return whether the inputs elsewhere are those of a manifest: they have no times that tell what is newer."""
    now = [[file.etag for file in source.files_read] for source in plan.inputs]
    try:
        then = [[file.get("etag", "") for file in files_read(source)] for source in manifest["inputs"]]
    except (LookupError, TypeError, AttributeError):
        return False
    return now == then


def _digest(content: IO[bytes], job: Job) -> str:
    """Return the digest of a job's tensor, as manifests hold it; the file is positioned at its first byte."""
    spans: list[str] = []
    for begin, end in bounds(job.numel, job.merged_elements, job.dtype):
        digest = xxhash.xxh3_128()
        left = (end - begin) * dtypes.size(job.dtype)
        while left and (piece := content.read(min(READ_BYTES, left))):
            digest.update(piece)
            left -= len(piece)
        spans.append(digest.hexdigest())
    return of_spans("".join(spans))
