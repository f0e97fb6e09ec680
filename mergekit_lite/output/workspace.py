"""Workspace of one output: its working folder, and the step that makes it the output.

    .NAME.partial/journal.jsonl    the spans that are written
    .NAME.partial/lock             held by the process that works here
    .NAME.partial/result/…         the files, complete only when every span is journalled

Publishing is a rename of ``result`` (or of the one file in it, then of its manifest): under the output's own name there
is nothing, or all of it. What has that name is replaced only with ``force``, even if it appeared during the run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.layout import Layout, OutputFile, is_single_file, write_torch_skeleton
from mergekit_lite.output import renames
from mergekit_lite.output.file_writer import PAGE, FileWriter, WriteTimes
from mergekit_lite.output.journal import Journal, Record, plan_of
from mergekit_lite.planning import Plan

MANIFEST_NAME = "mergekit_lite_manifest.json"
JOURNAL_NAME = "journal.jsonl"


def working_folder(output: Path) -> Path:
    """Return the folder in which an output is made."""
    output = output.absolute()
    return output.with_name(f".{output.name}.partial")


def manifest_path(output: Path) -> Path:
    """Return the path of a finished output's manifest."""
    return output.with_name(output.name + ".manifest.json") if is_single_file(output) else output / MANIFEST_NAME


def own_manifest(output: Path, plan: Plan, number: int) -> dict[str, Any] | None:
    """Return an output's manifest if this very plan wrote it after its inputs were last changed, else None."""
    try:
        manifest = json.loads(manifest_path(output).read_bytes())
        written = manifest_path(output).stat().st_mtime_ns
    except (OSError, ValueError):
        return None
    newest = max((time for _, _, time in plan.input_files), default=0)
    is_own = isinstance(manifest, dict) and manifest.get("plan") == plan.digest(number) and written >= newest
    return manifest if is_own and output.exists() else None


def check_target(output: Path, inputs: list[Path], *, resume: bool, force: bool) -> None:
    """Refuse an output path that would touch an input or something that exists. Raises UsageError."""
    target = output.resolve()
    if not output.absolute().name or output.name == "..":
        raise UsageError(f"{output}: can't be an output. Name the folder or file to be made.")
    for path in inputs:
        if target == path or target.is_relative_to(path) or path.is_relative_to(target):
            touching = f"lies in, around or at the input {path}"
            raise UsageError(f"{output}: {touching}. Inputs are never touched: choose another path.")
    if is_single_file(output) and output.is_dir():
        raise UsageError(f"{output}: is a folder, but its name ends like a file of weights. Choose another path.")
    if output.exists() and not is_single_file(output) and not output.is_dir():
        raise UsageError(f"{output}: is a file, not a folder. Choose another path.")
    standing = next((path for path in (output, manifest_path(output)) if os.path.lexists(path)), None)
    if standing is not None and not force:
        what = "exists, and is not the result of this run" if resume else "exists"
        raise UsageError(f"{standing}: {what}. --force replaces it.")
    if not (force or resume) and working_folder(output).exists():
        unfinished = f"{output}: an earlier run was not finished ({working_folder(output)})"
        raise UsageError(f"{unfinished}. --resume goes on with it, --force starts over.")


def is_half_published(output: Path) -> bool:
    """Return True where a run was killed between publishing its file and publishing the manifest."""
    result, manifest = working_folder(output) / "result", manifest_path(output)
    if not is_single_file(output) or not (result / manifest.name).exists() or not output.exists():
        return False
    try:
        # A published file is gone from the result, or has both names where it took a link and a removal.
        return all(path.samefile(output) for path in result.iterdir() if path.name != manifest.name)
    except OSError:  # another process is about to tidy up
        return False


def finish_publishing(output: Path) -> None:
    """Give the manifest of a half published file its name. Raises RunError."""
    manifest = manifest_path(output)
    try:
        with _locked(working_folder(output)) as is_ours:
            if is_ours and is_half_published(output):
                (working_folder(output) / "result" / manifest.name).replace(manifest)
    except OSError as error:
        raise RunError(_described(error, manifest)) from error


def tidy(output: Path, digest: str) -> None:
    """Remove the working folder of a published output, where a run of its plan was killed before it did so."""
    folder = working_folder(output)
    result = folder / "result"
    with _locked(folder) as is_ours:
        if is_ours and (not result.exists() or not any(result.iterdir()) or plan_of(folder / JOURNAL_NAME) == digest):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a working folder; yield False where there is no such folder or another process has the lock."""
    try:
        lock = (folder / "lock").open("ab")  # made anew where a removal was cut short after it
    except OSError:
        yield False
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


class OutputWorkspace:
    """Files of one output while they are made. Writes go to their final offsets, from any thread.

    It goes on with what an earlier run left in the working folder, or drops that where it shall start ``fresh``.
    ``digest`` is that of the plan; ``sources`` are path, size and time of every input file.
    Raises RunError where another process works here, or the folder belongs to another plan or can't be written.
    """

    def __init__(
        self, output: Path, layout: Layout, digest: str, sources: Sequence[tuple[str, int, int]], *, fresh: bool
    ) -> None:
        self.output = output
        self.folder = working_folder(output)
        self.result = self.folder / "result"
        self.layout = layout
        self._targets: list[FileWriter] = []
        self._times = WriteTimes()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._take(digest, sources, fresh)
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise RunError(_described(error, self.folder)) from error

    def _take(self, digest: str, sources: Sequence[tuple[str, int, int]], fresh: bool) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            another = "another process is making this output. Wait for it, or stop it."
            raise RunError(f"{self.folder}: {another}") from error
        if fresh:
            shutil.rmtree(self.result, ignore_errors=True)
            (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
        self.result.mkdir(exist_ok=True)
        self.journal = Journal(self.folder / JOURNAL_NAME, digest, sources)
        self._targets = [self._open(file) for file in self.layout.files]

    def _open(self, file: OutputFile) -> FileWriter:
        path = self.result / file.name
        whole = path.exists() and path.stat().st_size == file.size
        if not whole:
            self.journal.records.clear()
        if not whole and self.layout.nest is not None:
            with path.open("wb", buffering=0) as skeleton:
                write_torch_skeleton(skeleton, file.tensors, self.layout.nest)
        target = FileWriter(path, file.size, self._times)
        if self.layout.nest is None:
            target.write(0, memoryview(file.header))
        return target

    def skew(self, tensor: str, offset: int) -> int:
        """Return how many bytes after the start of a page of the file the byte at this offset of a tensor lies.

        Memory that lies as many bytes after the start of a page is written without a copy.
        """
        return (self.layout.places[tensor][1] + offset) % PAGE

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, from its byte ``offset`` on. Raises RunError (disk full, file limit, I/O error)."""
        number, start = self.layout.places[tensor]
        try:
            self._targets[number].write(start + offset, data)
        except OSError as error:
            raise RunError(_described(error, self.result / self.layout.files[number].name)) from error

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with what an earlier run wrote; return False where the file ends before."""
        number, start = self.layout.places[tensor]
        return self._targets[number].read(start + offset, buffer)

    def record(self, job: int, begin: int) -> Record | None:
        """Return an earlier run's record of a span, or None."""
        return self.journal.records.get((job, begin))

    def done(self, record: Record) -> None:
        """Record that a span's bytes are written. Raises RunError."""
        try:
            self.journal.add(record)
        except OSError as error:
            raise RunError(_described(error, self.folder / JOURNAL_NAME)) from error

    def publish(self, *, force: bool) -> None:
        """Give the finished result its name, and remove the working folder; ``force`` replaces what has the name.

        Raises RunError where that may not be replaced, or the system refuses; the result is kept.
        """
        try:
            if is_single_file(self.output):
                self._publish_file(force)
            elif force and os.path.lexists(self.output):
                renames.replace_folder(self.result, self.output, self.folder / "replaced")
            else:
                renames.rename(self.result, self.output)
        except FileExistsError as error:
            raise RunError(
                f"{error.filename2}: appeared while this output was made, and was left as it is. The finished work is "
                "kept: --resume --force puts it there, --resume does once the name is free."
            ) from error
        except OSError as error:
            raise RunError(_described(error, self.output)) from error
        shutil.rmtree(self.folder, ignore_errors=True)

    def _publish_file(self, force: bool) -> None:
        """Publish the file first: a manifest beside bytes of another run would vouch for them."""
        manifest = manifest_path(self.output)
        written, described = self.result / self.layout.files[0].name, self.result / manifest.name
        if force:
            written.replace(self.output)  # the result's is named as the first output's
            described.replace(manifest)
            return
        renames.rename(written, self.output)
        try:
            renames.rename(described, manifest)
        except FileExistsError:
            renames.rename(self.output, written)
            raise

    def close(self) -> None:
        """Close the files and release the folder."""
        for target in self._targets:
            target.close()
        self._targets.clear()
        self.journal.close()
        os.close(self._lock)


def _described(error: OSError, path: Path) -> str:
    kept = "What was finished is kept: make room and run again with --resume."
    match error.errno:
        case errno.ENOSPC:
            return f"{path}: the disk is full. {kept}"
        case errno.EDQUOT:
            return f"{path}: the disk quota is used up. {kept}"
        case errno.EFBIG:
            return f"{path}: the file would be larger than this system or its limits allow (see ulimit -f). {kept}"
    return f"{path}: can't be written: {error.strerror or error}. What was finished is kept; --resume goes on with it."
