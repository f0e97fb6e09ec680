"""Recognition of an output that is finished: by its bytes, as a manifest only describes them."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.engine.report import of_spans
from mergekit_lite.engine.tiling import bounds
from mergekit_lite.errors import UnreadableError
from mergekit_lite.layout import is_single_file
from mergekit_lite.output.manifest import READ_BYTES, frame_of
from mergekit_lite.output.workspace import own_manifest
from mergekit_lite.planning import Job, Plan


def is_finished(output: Path, plan: Plan, number: int) -> bool:
    """Return True where this very plan made the weights under an output's name; every byte of them is read."""
    manifest = own_manifest(output, plan, number)
    if manifest is None:
        return False
    paths = [output if is_single_file(output) else output / file.name for file in plan.layout.files]
    jobs = {job.name: job for job in plan.jobs}
    try:
        # Sizes and headers first: a few reads tell most of what is something else.
        for path, file, recorded in zip(paths, plan.layout.files, manifest["files"], strict=True):
            if path.stat().st_size != file.size or frame_of(plan.layout, path, file) != recorded["frame_xxh3_128"]:
                return False
        for path, file in zip(paths, plan.layout.files, strict=True):
            with path.open("rb") as content:
                for tensor in file.tensors:
                    content.seek(plan.layout.places[tensor.name][1])
                    if _digest(content, jobs[tensor.name]) != manifest["tensors"][tensor.name]["output"]:
                        return False
    except (OSError, UnreadableError, LookupError, TypeError, ValueError):  # missing files, or a manifest that changed
        return False
    return True


def _digest(content: IO[bytes], job: Job) -> str:
    """Return the digest of a job's tensor, as manifests hold it; the file is positioned at its first byte."""
    spans: list[str] = []
    for begin, end in bounds(job.numel, job.merged_elements):
        digest = xxhash.xxh3_128()
        left = (end - begin) * dtypes.size(job.dtype)
        while left and (piece := content.read(min(READ_BYTES, left))):
            digest.update(piece)
            left -= len(piece)
        spans.append(digest.hexdigest())
    return of_spans("".join(spans))
