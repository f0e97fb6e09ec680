"""A safetensors file whose tensors come one by one, in any order, and survive a kill.

Until it is complete it is ``NAME.partial``, of its full size from the start, and a ledger beside it says which tensors
are in it, each with a digest. The same work goes on with those; the file of other work is not touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
import xxhash

from mergekit_lite import positioned
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import not_written
from mergekit_lite.checkpoint.reader import bytes_of
from mergekit_lite.errors import UsageError
from mergekit_lite.gathering.kept_sums import KeptSums
from mergekit_lite.gathering.outputs import is_there, ledger_of
from mergekit_lite.layout import OutputTensor, safetensors_layout
from mergekit_lite.output.file_writer import reserve

PIECE = 1 << 24  # bytes read at once


class WorkingFile:
    """The file that is to be at ``path``, with tensors of known names and shapes, and metadata."""

    def __init__(self, path: Path, tensors: Sequence[OutputTensor], metadata: dict[str, str], *, force: bool) -> None:
        """Take up what an earlier run of the same work left; ``force`` drops what one of other work did.

        Raises:
            UsageError: another's unfinished work is there, or another's finished file and no ``force``.
            RunError: the file can't be written, or another process is at it.
        """
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self._layout = safetensors_layout([tensors], [path.name], metadata)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        [self._file] = self._layout.files
        work = xxhash.xxh3_128_hexdigest(self._file.header)
        self._ledger = Ledger(
            ledger_of(path),
            [(work, tensor.name) for tensor in tensors],
            key=lambda row: (row["work"], row["name"]),
            fields={"work": str, "name": str, "digest": str},
        )
        self._work = work
        try:
            self._descriptor = self._opened(force)
        except OSError as error:
            raise not_written(self.partial, error) from error
        self.missing = self._missing()

    def __enter__(self) -> WorkingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)
        self._ledger.close()

    def write(self, name: str, values: torch.Tensor) -> None:
        """Write a tensor; when this returns, a kill of the process doesn't lose it. Raises RunError."""
        data = bytes_of(values.reshape(-1))
        try:
            done = 0
            while done < len(data):
                done += positioned.write(self._descriptor, data[done:], self._place(name) + done)
        except OSError as error:
            raise not_written(self.partial, error) from error
        self._ledger.append([{"work": self._work, "name": name, "digest": xxhash.xxh3_128_hexdigest(data)}])

    def sums(self, *what: object) -> KeptSums:
        """Return where the sums of a pass are kept while it is on; ``what`` tells it from other passes of this work."""
        return KeptSums(self.path.with_name(f"{self.path.name}.sums"), (self._work, *what))

    def name(self) -> None:
        """Give the complete file its name; it is still known as this work's. Raises RunError."""
        try:
            self.partial.replace(self.path)
        except OSError as error:
            raise not_written(self.path, error) from error

    def clear(self) -> None:
        """Remove what was beside the file until it was complete. Raises RunError."""
        try:
            self.sums().discard()
            self._ledger.discard()
        except OSError as error:
            raise not_written(self.path, error) from error

    def _opened(self, force: bool) -> int:
        """Open the partial file, of its full size, with its header."""
        self._ledger.append([])  # takes the lock: nobody else is at the file
        header = self._file.header
        if not self.partial.exists() and self.path.exists():
            if self._ledger.keys and (descriptor := self._of_this_work(self.path)) is not None:
                os.close(descriptor)
                self.path.replace(self.partial)  # it got its name, and the others that belong to it did not
            elif not force:
                raise is_there(self.path)
        if self.partial.exists():
            if (descriptor := self._of_this_work(self.partial)) is not None:
                return descriptor
            if not force:
                raise UsageError(
                    f"{self.partial} is unfinished and of other work: another model, other prompts or options. Remove "
                    "it, name another output, or drop it by --force."
                )
        descriptor = positioned.open_file(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, links=False)
        try:
            reserve(descriptor, self._file.size)
        except OSError:
            self.partial.unlink()
            raise
        positioned.write(descriptor, memoryview(header), 0)
        return descriptor

    def _of_this_work(self, path: Path) -> int | None:
        """Open a file that is of the same work; return its descriptor, else None."""
        header = self._file.header
        descriptor = positioned.open_file(path, os.O_RDWR, links=False)
        is_same = positioned.read_bytes(descriptor, len(header), 0) == header
        if is_same and os.fstat(descriptor).st_size == self._file.size:
            return descriptor
        os.close(descriptor)
        return None

    def _missing(self) -> frozenset[str]:
        """Return the names of the tensors that are not in the file yet, or no longer as they were written."""
        digests = {(row["work"], row["name"]): row["digest"] for row in self._ledger.rows()}
        return frozenset(
            name for name in self._tensors if digests.get((self._work, name)) != self._digest(name, digests)
        )

    def _digest(self, name: str, digests: dict[tuple[str, str], str]) -> str:
        """Return the digest of a tensor's bytes in the file; empty where none is known."""
        if (self._work, name) not in digests:
            return ""
        digest = xxhash.xxh3_128()
        begin = self._place(name)
        for start in range(begin, begin + self._tensors[name].nbytes, PIECE):
            count = min(PIECE, begin + self._tensors[name].nbytes - start)
            digest.update(positioned.read_bytes(self._descriptor, count, start))
        return digest.hexdigest()

    def _place(self, name: str) -> int:
        return self._layout.place(name)[1]


def publish(files: Sequence[WorkingFile]) -> None:
    """Give complete files their names. All have them before any is cleared, so that a kill between loses no work."""
    for file in files:
        file.name()
    for file in files:
        file.clear()
