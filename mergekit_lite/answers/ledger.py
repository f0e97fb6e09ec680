"""A file of rows that are made one by one and survive a kill.

Until it is finished, rows are appended to ``NAME.partial.jsonl`` as they come, in any order, by the one process that
holds the lock ``NAME.partial.lock``. Once no expected row is missing they are written in the expected order as
``NAME.jsonl``, and both are removed. So a finished ledger's bytes depend on its rows alone, not on interruptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from mergekit_lite.answers.rows import Fields, as_line, not_written, read_rows, write_lines
from mergekit_lite.errors import RunError
from mergekit_lite.locks import lock_file

K = TypeVar("K", bound=Hashable)


class _Place(NamedTuple):
    file: Path
    start: int  # in bytes


class Ledger(Generic[K]):
    """The rows for the ``expected`` keys, in that order, at ``path`` (``….jsonl``).

    Rows that are no longer expected are left out of the finished file, and so are lines that are no rows: those that a
    kill cut short, without a key, or without the ``fields`` that ``read_rows`` takes. Memory has the keys only.
    """

    def __init__(
        self, path: Path, expected: Sequence[K], key: Callable[[dict[str, Any]], K], fields: Fields | None = None
    ):
        self.path = path
        self.partial = path.with_name(f"{path.stem}.partial.jsonl")
        self._lock_file = path.with_name(f"{path.stem}.partial.lock")  # where locks bind, nobody could read the rows
        self._lock: BinaryIO | None = None
        self.expected = tuple(expected)
        self.key = key
        self.fields = fields
        self._appending: BinaryIO | None = None
        self._places: dict[K, _Place] = {}
        self._finished = tuple(self._take(self.path))
        self._take(self.partial)

    def __contains__(self, key: K) -> bool:
        return key in self._places

    @property
    def keys(self) -> list[K]:
        """The keys that have a row, expected or not, as they were found and appended."""
        return list(self._places)

    @property
    def missing(self) -> list[K]:
        """The keys that have no row yet, in order."""
        return [key for key in self.expected if key not in self._places]

    @property
    def is_finished(self) -> bool:
        """Whether the file has the expected rows and the partial file is gone."""
        return self._finished == self.expected and self.path.exists() and not self.partial.exists()

    def rows(self, keys: Iterable[K] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the stored rows of some keys, in their order; by default of those that are expected."""
        yield from map(json.loads, self._lines(self.expected if keys is None else keys))

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows; when this returns, a kill of the process doesn't lose them.

        Raises:
            RunError: another process makes the same file, or it can't be written.
        """
        try:
            file = self._appending or self._open()
            for row in rows:
                key = self.key(row)
                if key not in self._places:
                    self._places[key] = _Place(self.partial, file.tell())
                    file.write(as_line(row).encode())
            file.flush()
        except OSError as error:
            raise not_written(self.partial, error) from error

    def finish(self, *, with_missing: bool = False) -> None:
        """Write the finished file. Raises ValueError for missing rows, unless ``with_missing`` leaves them out."""
        if not with_missing and (missing := self.missing):
            raise ValueError(f"{self.path}: {len(missing)} rows are missing")
        if not self.is_finished:
            write_lines(self.path, self._lines(self.expected))
        self.close()
        self.partial.unlink(missing_ok=True)
        self._lock_file.unlink(missing_ok=True)
        self._places = {}
        self._finished = tuple(self._take(self.path))

    def discard(self) -> None:
        """Remove the rows of an unfinished file: what they were kept for is done."""
        self.close()
        self.partial.unlink(missing_ok=True)
        self._lock_file.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the file to other processes."""
        if self._appending is not None:
            with suppress(OSError):  # ``append`` has flushed and reported
                self._appending.close()
            self._appending = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _lines(self, keys: Iterable[K]) -> Iterator[bytes]:
        files: dict[Path, BinaryIO] = {}
        try:
            for key in keys:
                if key in self._places:
                    path, start = self._places[key]
                    file = files.get(path) or files.setdefault(path, path.open("rb"))
                    file.seek(start)
                    line = file.readline()
                    yield line if line.endswith(b"\n") else line + b"\n"
        finally:
            for file in files.values():
                file.close()

    def _take(self, path: Path) -> list[K | None]:
        """Note the places of a file's rows; return their keys in the order of the file, and None for what is no row."""
        keys: list[K | None] = []
        torn: list[str] = []  # a message for each line that is no row
        for line in read_rows(path, torn, self.fields) if path.exists() else ():
            try:
                key = self.key(line.row)
                self._places.setdefault(key, _Place(path, line.start))
            except (KeyError, TypeError):  # it has no key, or a list or an object in its place
                keys.append(None)
            else:
                keys.append(key)
        return keys + [None for _ in torn]

    def _open(self) -> BinaryIO:
        """Open the partial file for this process alone, at the start of a line."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(self._lock_file)
        if self._lock is None:
            raise RunError(f"{self.partial}: another process is making this file. Wait for it, or stop it.")
        try:
            file = self.partial.open("a+b")
        except OSError:
            self.close()
            raise
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        self._appending = file
        return file
