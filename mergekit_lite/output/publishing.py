"""What stands under an output's name: whether a run may put its output there, or an earlier one did already."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_lite.checkpoint.folder import MAX_FILE_NAME
from mergekit_lite.errors import UNFINISHED, CheckpointError, RunError, UsageError
from mergekit_lite.file_names import unfit_on_windows
from mergekit_lite.input_files import read_json
from mergekit_lite.layout import is_single_file
from mergekit_lite.object_stores import OBJECTS, WEB
from mergekit_lite.output.journal import plan_of
from mergekit_lite.output.sync import sync_name, sync_tree
from mergekit_lite.output.working_folder import (
    RESULT,
    WorkingFolder,
    as_run_errors,
    left_by_earlier_run,
    working_folder,
)
from mergekit_lite.output.workspace import manifest_path, publish_one

URL_PARTS = tuple(f"{scheme}:" for scheme in (*OBJECTS, *WEB))  # what a path made of a URL begins with
Manifest: TypeAlias = dict[str, Any]


def check_target(output: Path, inputs: Sequence[Path], *, resume: bool, force: bool) -> None:
    """Refuse an output path that would touch an input or something that exists. Raises UsageError."""
    _check_name(output)
    target = Path(os.path.realpath(output))
    for path in inputs:
        if target == path or target.is_relative_to(path) or path.is_relative_to(target):
            touching = f"lies in, around or at the input {path}"
            raise UsageError(f"{output}: {touching}. Inputs are never touched: choose another path.")
    try:
        output.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(f"{output}: can't be an output: {error.strerror}.") from error
    if is_single_file(output) and output.is_dir():
        raise UsageError(f"{output}: is a folder, but its name ends like a file of weights. Choose another path.")
    if output.exists() and not is_single_file(output) and not output.is_dir():
        raise UsageError(f"{output}: is a file, not a folder. Choose another path.")
    standing = next((path for path in (output, manifest_path(output)) if os.path.lexists(path)), None)
    if standing is not None and not force:
        what = "exists, and is not the result of this run" if resume else "exists"
        raise UsageError(f"{standing}: {what}. --force replaces it.")
    if not (force or resume) and os.path.lexists(working_folder(output)):
        left = f"{output}: an earlier run was not finished ({working_folder(output)})"
        raise UsageError(f"{left}. {UNFINISHED}.")


def _check_name(output: Path) -> None:
    """Raise UsageError where a file or folder can't have an output's name, or what is made beside it can't."""
    if output.parts and output.parts[0] in URL_PARTS and not Path(output.parts[0]).exists():
        raise UsageError(f"{output}: a URL is given as text, to what can write there: merge, extrapolate and vector.")
    name = output.absolute().name
    if not name or output.name == "..":
        raise UsageError(f"{output}: can't be an output. Name the folder or file to be made.")
    drive = Path(output.absolute().anchor)
    if not drive.exists():
        raise UsageError(f"{output}: there is no {drive} here. Choose another path.")
    for part in output.parts if os.name == "nt" else ():
        if part not in (output.anchor, "..") and (why := unfit_on_windows(part)):
            raise UsageError(f"{output}: Windows can't have the name {part}: it {why}. Choose another one.")
    longest = max(len(os.fsencode(path.name)) for path in (manifest_path(output), working_folder(output)))
    if longest > MAX_FILE_NAME:
        raise UsageError(
            f"{name[:40]}…: is too long a name: those of its manifest and working folder, which are made of it, would "
            f"have {longest} bytes, and a name has at most {MAX_FILE_NAME}. Take {longest - MAX_FILE_NAME} off."
        )


def own_manifests(output: Path, digest: str, sources: Sequence[tuple[str, int, int]]) -> Iterator[Manifest]:
    """Yield the manifests of an output that a plan of this digest wrote after its inputs were last changed.

    One may stand under its name, one wait in the working folder for its own, where a run was killed once it had
    published the file.
    """
    for path in (manifest_path(output), _waiting_manifest(output)):
        manifest = _own_manifest(path, digest, sources) if path is not None and os.path.lexists(output) else None
        if manifest is not None:
            yield manifest


def is_published(
    output: Path,
    digest: str,
    sources: Sequence[tuple[str, int, int]],
    describes: Callable[[Manifest], bool],
    *,
    force: bool,
    sync: bool,
) -> bool:
    """Return True where an output stands that a plan of this digest made, and finish what a kill kept from being done.

    Args:
        output: its path.
        digest: of the plan.
        sources: path, size and time of every input file.
        describes: whether the bytes that stand under the name are those that a manifest describes.
        force: give the manifest its name even where something has it.
        sync: bring all of it to the disk.

    Raises:
        RunError: the manifest can't be given its name.
    """
    waiting = _waiting_manifest(output)
    with left_by_earlier_run(output) as folder, as_run_errors(output):
        manifest = _own_manifest(manifest_path(output), digest, sources)
        if manifest is None or not describes(manifest):
            if folder is None or waiting is None:
                return False
            manifest = _own_manifest(waiting, digest, sources)
            if manifest is None or not describes(manifest):
                return False
            _publish_manifest(waiting, manifest_path(output), folder, force=force)
        if sync:
            for path in {output, manifest_path(output)}:
                sync_tree(path)
            sync_name(output)
        if folder is not None and (plan_of(folder.journal) == digest or not folder.result.exists()):
            folder.remove()  # unless a run of another plan is unfinished there
    return True


def _publish_manifest(waiting: Path, target: Path, folder: WorkingFolder, *, force: bool) -> None:
    """Give a manifest its name; where the run that was killed had replaced a file by force, its manifest is, too."""
    replaced = (waiting.with_name(waiting.name.removesuffix(".manifest.json")), folder.replaced)
    try:
        publish_one(waiting, target, folder, force=force or any(map(os.path.lexists, replaced)))
    except FileExistsError as error:
        raise RunError(f"{target}: exists, and is not the manifest of this run. --force replaces it.") from error


def _waiting_manifest(output: Path) -> Path | None:
    """Return where a single file's manifest lies until it gets its name; None for a folder, which has it inside."""
    return working_folder(output) / RESULT / manifest_path(output).name if is_single_file(output) else None


def _own_manifest(path: Path, digest: str, sources: Sequence[tuple[str, int, int]]) -> Manifest | None:
    """Return a manifest that a plan of this digest wrote after its inputs were last changed, else None."""
    try:
        if not path.is_file():
            return None
        manifest = read_json(path)
        written = path.stat().st_mtime_ns
    except (OSError, CheckpointError):
        return None
    newest = max((time for _, _, time in sources), default=0)
    return manifest if manifest.get("plan") == digest and written >= newest else None
