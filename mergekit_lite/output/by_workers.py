"""What stands for the workspace of an output in an object store where a worker on another machine makes it.

Where an output has several files, a worker makes a file whole, with a spool of its own, and sends it by itself; the
command is told its size and tag. Where it has one, workers send its bytes back with their results, and the command
sends them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import xxhash

from mergekit_lite.layout import Layout, OutputFile, write_torch_skeleton
from mergekit_lite.object_stores import Place
from mergekit_lite.output.file_writer import PAGE
from mergekit_lite.output.journal import Record
from mergekit_lite.output.spool import Spool
from mergekit_lite.output.upload import Extent, Upload, Uploaded, stop_all
from mergekit_lite.output.working_folder import as_run_errors

WINDOW = 1 << 26  # bytes that a worker has made of a file and not sent yet: else it waits
Written = tuple[str, int, bytes]  # of a tensor, from its byte on


class NothingEarlier:
    """The part of a sink that tells what an earlier run wrote: nothing that a worker could go on with."""

    def record(self, job: int, begin: int) -> Record | None:
        """Return None."""
        return None

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Return False."""
        return False

    def done(self, record: Record) -> None:
        """Do nothing: the command notes what is done."""


class Parcel(NothingEarlier):
    """What a worker wrote of an output, to be sent back."""

    def __init__(self) -> None:
        self._written: list[Written] = []

    def skew(self, tensor: str, offset: int) -> int:
        """Return 0: every place in a page is as good."""
        return 0

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Keep bytes of a tensor."""
        self._written.append((tensor, offset, bytes(data)))

    def taken(self) -> list[Written]:
        """Return what was written since this was last asked."""
        written, self._written = self._written, []
        return written


@dataclass(frozen=True)
class RemoteFiles:
    """The files of an output of which a worker makes some; ``names`` are those in the store, by their numbers.

    ``settled`` are the numbers of those that stand already; ``in_flight`` bounds the bytes of an upload's parts.
    """

    place: Place
    layout: Layout
    names: Sequence[str]
    settled: Collection[int]
    in_flight: int

    def begun(self, number: int) -> RemoteFile:
        """Begin to make a file, and to send it."""
        return RemoteFile(self, number)


class RemoteFile(NothingEarlier):
    """One file of an output while a worker makes it; its upload ends with its context, if it is not complete then."""

    def __init__(self, files: RemoteFiles, number: int) -> None:
        file, spools = files.layout.files[number], Path(tempfile.gettempdir())
        self._layout, self._number = files.layout, number
        self._uploaded: Uploaded | None = None
        with as_run_errors(spools), tempfile.TemporaryFile(dir=spools) as skeleton:
            write_skeleton(files.layout, file, skeleton)
            self._spool = Spool(spools)
            self._upload = Upload(
                files.place / files.names[number], self._spool, file.size, self._note, in_flight=files.in_flight
            )
            send_around(files.layout, file, skeleton, self._spool, self._upload)

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        stop_all([self._upload])
        self._spool.close()

    def _note(self, uploaded: Uploaded) -> None:
        self._uploaded = uploaded

    def skew(self, tensor: str, offset: int) -> int:
        """Return how many bytes after the start of a page of the file the byte at this offset of a tensor lies."""
        return (self._layout.place(tensor)[1] + offset) % PAGE

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, unless it lies in another file, and send them when it is their turn.

        Waits while the upload is far behind. Raises RunError.
        """
        number, start = self._layout.place(tensor)
        if number != self._number:
            return
        begin = start + offset
        with as_run_errors(Path(tempfile.gettempdir())):
            self._spool.write(begin, data)
        self._upload.made(Extent(begin, begin + len(data), xxhash.xxh3_128_hexdigest(data)))
        self._upload.wait(WINDOW)

    def complete(self) -> Uploaded:
        """Wait until the store has all of it, and return what it has. Raises RunError."""
        self._upload.complete()
        assert self._uploaded is not None
        return self._uploaded


def write_skeleton(layout: Layout, file: OutputFile, skeleton: IO[bytes]) -> None:
    """Write a file without its tensors' data: what lies around them, and holes. Raises OSError."""
    if layout.nest is not None:
        write_torch_skeleton(skeleton, file.tensors, layout.nest)
    else:
        skeleton.write(file.header)
    skeleton.truncate(file.size)


def send_around(layout: Layout, file: OutputFile, skeleton: IO[bytes], spool: Spool, upload: Upload) -> None:
    """Begin an upload with what lies around the tensors of a file, from its skeleton. Raises OSError."""
    for begin, end in around(layout, file):
        skeleton.seek(begin)
        spool.write(begin, memoryview(skeleton.read(end - begin)))
        upload.made(Extent(begin, end))


def around(layout: Layout, file: OutputFile) -> list[tuple[int, int]]:
    """Return what lies around the tensors of a file: the begin and end of each piece."""
    places = sorted((layout.place(tensor.name)[1], tensor.nbytes) for tensor in file.tensors)
    begins = [0, *(begin + length for begin, length in places)]
    ends = [*(begin for begin, _ in places), file.size]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]
