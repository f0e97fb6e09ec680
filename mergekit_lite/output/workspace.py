"""Workspace of one output: its files while they are written in the working folder, and the step that publishes them.

Publishing is a rename of the folder ``result`` (or of the one file in it, then of its manifest): under the output's own
name there is nothing, or all of it. What has that name is replaced only with ``force``, even if it appeared during the
run, and removed only when the new one stands whole.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

from mergekit_lite.errors import RunError
from mergekit_lite.layout import Layout, OutputFile, OutputPath, is_single_file, write_torch_skeleton
from mergekit_lite.object_stores import Place
from mergekit_lite.output import renames
from mergekit_lite.output.file_writer import PAGE, FileWriter, WriteTimes
from mergekit_lite.output.journal import Journal, Record
from mergekit_lite.output.spool import Spool
from mergekit_lite.output.sync import sync_name, sync_tree
from mergekit_lite.output.working_folder import WorkingFolder, as_run_errors, open_own

MANIFEST_NAME = "mergekit_lite_manifest.json"


@overload
def manifest_path(output: Path) -> Path: ...


@overload
def manifest_path(output: Place) -> Place: ...


def manifest_path(output: OutputPath) -> OutputPath:
    """Return the path of a finished output's manifest."""
    return output.with_name(output.name + ".manifest.json") if is_single_file(output) else output / MANIFEST_NAME


class OutputWorkspace:
    """Files of one output while they are made. Writes go to their final offsets, from any thread.

    It goes on with what an earlier run left in the working folder, which it takes over and closes at the end.
    ``digest`` is that of the plan; ``sources`` are path, size and time of every input file; ``companions`` are the
    names of all files that may come beside the weights, relative to the result.
    Raises RunError where the folder belongs to another plan, holds foreign files, or can't be written.
    """

    def __init__(
        self,
        folder: WorkingFolder,
        layout: Layout,
        digest: str,
        sources: Sequence[tuple[str, int, int]],
        companions: Collection[str],
    ) -> None:
        self.folder = folder
        self.output = folder.output
        self.result = folder.result
        self.layout = layout
        self.companions = companions
        self._names = {*companions, *(file.name for file in layout.files)}
        self._targets: list[FileWriter | Spool] = []
        self._times = WriteTimes()
        self.is_shared = False
        with as_run_errors(folder.path):
            self.journal = Journal(folder.journal, digest, sources, len(layout.places))
            try:
                self.result.mkdir(exist_ok=True)
                folder.check_result(self._names)
                self._remove_companions()  # they are written anew, and not into what lies here
                for file in layout.files:
                    self._targets.append(self._open(file))
            except BaseException:
                self.close()
                raise

    def weigh_waiting(self, weight: float) -> None:
        """Say what a second counts that a write waits for the disk; see ``file_writer.waiting_weight``."""
        self._times.waiting_weight = weight

    def share(self) -> None:
        """Let workers on other machines write to the files, too. Raises RunError."""
        self.is_shared = True
        with as_run_errors(self.result):
            for target in self._targets:
                assert isinstance(target, FileWriter)
                target.flush()  # nothing of this machine's is still on its way when others write beside it

    def __getstate__(self) -> dict[str, Any]:
        """Return what makes a workspace for a worker in another process: it writes and reads back, and no more."""
        own = ("result", "layout", "journal", "is_shared")
        return {name: vars(self)[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._times = WriteTimes()
        paths = [self.result / file.name for file in self.layout.files]
        with as_run_errors(self.result):
            self._targets = [FileWriter(path, None, self._times, shared=self.is_shared) for path in paths]

    def _open(self, file: OutputFile) -> FileWriter | Spool:
        path = self.result / file.name
        if path.parent != self.result:
            path.parent.mkdir(exist_ok=True, parents=True)
        if not _is_whole(path, file.size):
            self.journal.clear()
            path.unlink(missing_ok=True)
            if self.layout.nest is not None:
                with os.fdopen(open_own(path, os.O_WRONLY | os.O_CREAT), "wb") as skeleton:
                    write_torch_skeleton(skeleton, file.tensors, self.layout.nest)
        target = FileWriter(path, file.size, self._times)
        if self.layout.nest is None:
            target.write(0, memoryview(file.header))
        return target

    def _remove_companions(self) -> None:
        for name in self.companions:
            if (path := self.result / name).exists():
                path.unlink()

    def skew(self, tensor: str, offset: int) -> int:
        """Return how many bytes after the start of a page of the file the byte at this offset of a tensor lies.

        Memory that lies as many bytes after the start of a page is written without a copy.
        """
        return (self.layout.place(tensor)[1] + offset) % PAGE

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, from its byte ``offset`` on. Raises RunError (disk full, file limit, I/O error)."""
        number, start = self.layout.place(tensor)
        with as_run_errors(self.result / self.layout.files[number].name):
            self._targets[number].write(start + offset, data)

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with what an earlier run wrote; return False where the file ends before."""
        number, start = self.layout.place(tensor)
        return self._targets[number].read(start + offset, buffer)

    def record(self, job: int, begin: int) -> Record | None:
        """Return an earlier run's record of a span, or None."""
        return self.journal.get((job, begin))

    def done(self, record: Record) -> None:
        """Record that a span's bytes are written. Raises RunError."""
        with as_run_errors(self.folder.journal):
            self.journal.add(record)

    @contextmanager
    def adding_companions(self) -> Iterator[Path]:
        """Give the folder in which the companions are to be written. Raises RunError where that fails."""
        with as_run_errors(self.result):
            yield self.result

    def publish(self, *, force: bool, sync: bool) -> None:
        """Give the finished result its name, and remove the working folder.

        ``force`` replaces what has the name; ``sync`` brings the result to the disk before, and its name after.
        Raises RunError where what has the name may not be replaced, or the system refuses; the result is kept.
        """
        with as_run_errors(self.output):
            self.folder.check_result(self._names)
            if sync:
                sync_tree(self.result)
            self.close()  # before it is renamed: some systems rename and remove no open file
            try:
                self._rename(force)
            except FileExistsError as error:
                raise RunError(
                    f"{error.filename2}: appeared while this output was made, and was left as it is. The finished work "
                    "is kept: --resume --force puts it there, --resume does once the name is free."
                ) from error
            if sync:
                sync_name(self.output)
        self.folder.remove()

    def _rename(self, force: bool) -> None:
        if not is_single_file(self.output):
            publish_one(self.result, self.output, self.folder, force=force)
            return
        written, manifest = self.result / self.layout.files[0].name, manifest_path(self.output)
        is_taken = os.path.lexists(self.output)
        # The file comes first: a manifest beside bytes of another run would vouch for them.
        publish_one(written, self.output, self.folder, force=force)
        try:
            publish_one(self.result / manifest.name, manifest, self.folder, force=force)
        except OSError:
            with suppress(OSError):
                if os.path.lexists(written):  # what had the name
                    renames.replace(written, self.output, self.folder.replaced)
                elif not is_taken:
                    renames.rename(self.output, written)
            raise

    def close(self) -> None:
        """Close the files and the journal."""
        for target in self._targets:
            target.close()
        self._targets.clear()
        self.journal.close()


def publish_one(source: Path, target: Path, folder: WorkingFolder, *, force: bool) -> None:
    """Rename a file or folder out of a working folder; ``force`` puts what has the name in its place.

    Raises OSError; FileExistsError where the name is taken and may not be replaced.
    """
    try:
        renames.rename(source, target)
    except FileExistsError:
        if not force:
            raise
        renames.replace(source, target, folder.replaced)


def _is_whole(path: Path, size: int) -> bool:
    """Return whether an earlier run left a file of its full size that has no second name, under which it is published.

    A kill can leave one where publishing takes a link and a removal.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size and status.st_nlink == 1
