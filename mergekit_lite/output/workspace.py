"""The working folder of one output, beside it, and the step that makes it the output.

    .NAME.partial/journal.jsonl    what is done
    .NAME.partial/lock             held by the process that works here
    .NAME.partial/result/…         the files, complete only when every span is journalled

Publishing is a rename of ``result`` (or of the one file in it): under the output's own name there is nothing, or all
of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mergekit_lite.checkpoint.folder import WEIGHT_SUFFIXES
from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.layout import Layout, OutputFile, write_torch_skeleton
from mergekit_lite.output.journal import Journal, Record
from mergekit_lite.output.target import PAGE, Pace, Target
from mergekit_lite.planning import Plan

MANIFEST_NAME = "mergekit_lite_manifest.json"


def is_single_file(output: Path) -> bool:
    """Whether an output path names one file rather than a folder."""
    return output.suffix in WEIGHT_SUFFIXES


def working_folder(output: Path) -> Path:
    """Where an output is made."""
    output = output.absolute()
    return output.with_name(f".{output.name}.partial")


def manifest_path(output: Path) -> Path:
    """Where a finished output's manifest is."""
    return output.with_name(output.name + ".manifest.json") if is_single_file(output) else output / MANIFEST_NAME


def is_finished(output: Path, plan: Plan, number: int) -> bool:
    """Whether the output exists already, made by this very plan after its inputs were last changed."""
    try:
        manifest = json.loads(manifest_path(output).read_bytes())
        made = manifest_path(output).stat().st_mtime_ns
    except (OSError, ValueError):
        return False
    newest = max((time for _, _, time in plan.input_files), default=0)
    return (
        output.exists()
        and made >= newest
        and isinstance(manifest, dict)
        and manifest.get("plan") == plan.digest(number)
    )


def check_target(output: Path, inputs: list[Path], *, resume: bool, force: bool) -> None:
    """Refuse an output path that would touch an input or something that exists. Raises UsageError."""
    target = output.resolve()
    if not output.absolute().name or output.name == "..":
        raise UsageError(f"{output}: can't be an output. Name the folder or file to be made.")
    for path in inputs:
        if target == path or target.is_relative_to(path) or path.is_relative_to(target):
            raise UsageError(
                f"{output}: lies in, around or at the input {path}. Inputs are never touched: choose another path."
            )
    if is_single_file(output) and output.is_dir():
        raise UsageError(f"{output}: is a folder, but its name ends like a file of weights. Choose another path.")
    if output.exists() and not is_single_file(output) and not output.is_dir():
        raise UsageError(f"{output}: is a file, not a folder. Choose another path.")
    if force or resume:
        if output.exists() and not force:
            raise UsageError(f"{output}: exists, and is not the result of this run. --force replaces it.")
        return
    if output.exists():
        raise UsageError(f"{output}: exists. --force replaces it.")
    if working_folder(output).exists():
        raise UsageError(
            f"{output}: an earlier run was not finished ({working_folder(output)}). "
            "--resume goes on with it, --force starts over."
        )


def tidy(output: Path) -> None:
    """Remove the working folder of a published output, where a run was killed before it came to that."""
    folder = working_folder(output)
    result = folder / "result"
    try:
        with (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not result.exists() or not any(result.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # there is none, or somebody works there
        return


class Workspace:
    """The files of one output while they are being made. Writes go to their final offsets, from any thread."""

    def __init__(
        self, output: Path, layout: Layout, digest: str, sources: Sequence[tuple[str, int, int]], *, fresh: bool
    ) -> None:
        """Take the working folder, or make it.

        Args:
            output: the path to be made.
            layout: of its files.
            digest: of the plan, as the journal will name it.
            sources: path, size and time of every input file.
            fresh: drop what an earlier run left.

        Raises:
            RunError: another process works here, the folder belongs to another plan, or can't be written.
        """
        self.output = output
        self.folder = working_folder(self.output)
        self.result = self.folder / "result"
        self.layout = layout
        self._targets: list[Target] = []
        self._pace = Pace()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock)
                raise RunError(
                    f"{self.folder}: another process is making this output. Wait for it, or stop it."
                ) from error
            try:
                self._take(digest, sources, fresh)
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise RunError(_described(error, self.folder)) from error

    def _take(self, digest: str, sources: Sequence[tuple[str, int, int]], fresh: bool) -> None:
        if fresh:
            shutil.rmtree(self.result, ignore_errors=True)
            (self.folder / "journal.jsonl").unlink(missing_ok=True)
        self.result.mkdir(exist_ok=True)
        self.journal = Journal(self.folder / "journal.jsonl", digest, sources)
        self._targets = [self._open(file) for file in self.layout.files]

    def _open(self, file: OutputFile) -> Target:
        path = self.result / file.name
        whole = path.exists() and path.stat().st_size == file.size
        if not whole:
            self.journal.records.clear()
        if not whole and self.layout.nest is not None:
            try:
                write_torch_skeleton(path, file.tensors, self.layout.nest)
            except RuntimeError as error:  # what torch makes of a full disk
                raise RunError(f"{path}: torch can't lay the file out: {str(error).splitlines()[0]}") from error
        target = Target(path, file.size, self._pace)
        if self.layout.nest is None:
            target.write(0, memoryview(file.header))
        return target

    def skew(self, tensor: str, offset: int) -> int:
        """How far behind the begin of a page of its file the byte at this offset of a tensor lies.

        Memory that lies so behind the begin of a page too is written without a copy.
        """
        return (self.layout.places[tensor][1] + offset) % PAGE

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Put bytes in their place: ``offset`` bytes into a tensor.

        Raises RunError (disk full, file limit, I/O error).
        """
        number, start = self.layout.places[tensor]
        try:
            self._targets[number].write(start + offset, data)
        except OSError as error:
            raise RunError(_described(error, self.result / self.layout.files[number].name)) from error

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Read back what an earlier run wrote; False where it is not all there."""
        number, start = self.layout.places[tensor]
        return self._targets[number].read(start + offset, buffer)

    def record(self, job: int, begin: int) -> Record | None:
        """What an earlier run noted of a span."""
        return self.journal.records.get((job, begin))

    def done(self, record: Record) -> None:
        """Note that a span's bytes are written."""
        try:
            self.journal.add(record)
        except OSError as error:
            raise RunError(_described(error, self.folder / "journal.jsonl")) from error

    def publish(self) -> None:
        """Give the finished result its name, and remove the working folder."""
        replaced = self.folder / "replaced"
        try:
            if is_single_file(self.output):
                manifest = manifest_path(self.output)
                (self.result / manifest.name).replace(manifest)
                (self.result / self.layout.files[0].name).replace(self.output)  # named as the first output's
            else:
                if self.output.exists():
                    self.output.rename(replaced)
                self.result.rename(self.output)
        except OSError as error:
            raise RunError(_described(error, self.output)) from error
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the files and let go of the folder."""
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
