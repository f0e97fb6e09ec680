"""A file of rows that is made one by one and survives a kill.

While it is made, rows are appended to ``NAME.partial.jsonl`` as they come, in any order. Once every expected row is
there they are sorted into the expected order, written as ``NAME.jsonl``, and the partial file goes. So a finished
ledger's bytes depend on its rows alone, not on who was killed when.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from mergekit_lite.answers.rows import as_line, read_rows, write_rows

K = TypeVar("K", bound=Hashable)


class Ledger(Generic[K]):
    """The rows for the ``expected`` keys, in that order, at ``path`` (``….jsonl``).

    A row that is already there is never asked for again; rows that are no longer expected are left out of the finished
    file. A torn last line, of a kill while it was written, is dropped.
    """

    def __init__(self, path: Path, expected: Sequence[K], key: Callable[[dict[str, Any]], K]):
        self.path = path
        self.partial = path.with_name(f"{path.stem}.partial.jsonl")
        self.expected = tuple(expected)
        self.key = key
        self.rows: dict[K, dict[str, Any]] = {}
        for file in (self.path, self.partial):
            if file.exists():
                self._take(file)

    @property
    def missing(self) -> list[K]:
        """The keys that have no row yet, in order."""
        return [key for key in self.expected if key not in self.rows]

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows; when this returns, a kill of the process doesn't lose them."""
        new = [row for row in rows if self.key(row) not in self.rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.partial.open("a", encoding="utf-8") as file:
            file.write("".join(as_line(row) for row in new))
        self.rows.update((self.key(row), row) for row in new)

    def finish(self) -> list[dict[str, Any]]:
        """The rows in order, as the finished file now holds them. Only once none is missing."""
        rows = [self.rows[key] for key in self.expected]
        if self.partial.exists() or not self.path.exists():
            write_rows(self.path, rows)
            self.partial.unlink(missing_ok=True)
        return rows

    def _take(self, file: Path) -> None:
        self._drop_torn_line(file)
        problems: list[str] = []
        for line in read_rows(file, problems):
            try:
                self.rows.setdefault(self.key(line.row), line.row)
            except (KeyError, TypeError):
                continue

    @staticmethod
    def _drop_torn_line(file: Path) -> None:
        """Cut what follows the last line end, so that the next row begins a line of its own."""
        content = file.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(file, content.rfind(b"\n") + 1)
