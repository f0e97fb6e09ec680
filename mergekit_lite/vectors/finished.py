"""Vectors that an earlier run has finished: recognised, so that their extraction is not done again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lite.layout import OutputPath
from mergekit_lite.object_stores import Place
from mergekit_lite.output.publishing import is_published
from mergekit_lite.output.remote_target import is_published_remotely, remote_manifest
from mergekit_lite.vectors import peft_folder
from mergekit_lite.vectors.extracted import Extracted, describes


def published(
    output: OutputPath, run: Mapping[str, Any], sources: Sequence[tuple[str, int, int]], *, force: bool, sync: bool
) -> Extracted | None:
    """Return the result of an earlier run that made this very output, None where none did. Raises RunError."""
    if isinstance(output, Place):
        return _published_remotely(output, run, sources)
    weights = output / peft_folder.WEIGHTS if run["format"] == "lora" else output
    results: list[Extracted] = []

    def is_result(manifest: Mapping[str, Any]) -> bool:
        try:
            results.append(Extracted.from_manifest(output, manifest))
        except (LookupError, AttributeError, TypeError, ValueError):
            return False
        return describes(weights, manifest)

    return results[-1] if is_published(output, run["plan"], sources, is_result, force=force, sync=sync) else None


def _published_remotely(
    output: Place, run: Mapping[str, Any], sources: Sequence[tuple[str, int, int]]
) -> Extracted | None:
    try:
        extracted = Extracted.from_manifest(str(output), remote_manifest(output) or {})
    except (LookupError, AttributeError, TypeError, ValueError):
        return None
    files = {peft_folder.WEIGHTS if run["format"] == "lora" else output.name: extracted.nbytes}
    newest = max((time for _, _, time in sources), default=0)
    return extracted if is_published_remotely(output, run["plan"], files, newest) else None
