"""Where the engine puts the bytes it makes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, MutableMapping
from typing import Protocol

from mergekit_lite.output.journal import Record

MOST_ELEMENTS = 1 << 48  # of a tensor


class Sink(Protocol):
    """Where the bytes of one output go: an ``OutputWorkspace``, or what only looks at them."""

    def record(self, job: int, begin: int) -> Record | None:
        """Return what is known of a span that was written earlier."""

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Read back what was written earlier; False where it is not all there."""

    def skew(self, tensor: str, offset: int) -> int:
        """Return how far behind the begin of a page of memory the byte at this offset had best lie."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Take bytes, ``offset`` bytes into a tensor."""

    def done(self, record: Record) -> None:
        """Take note that all of a span's bytes are written."""


class RecordTable(MutableMapping[tuple[int, int], Record]):
    """Records by job and first element, each pickled: as objects they would take three times the memory.

    For the same reason a key is kept as one number.
    """

    def __init__(self) -> None:
        self._pickled: dict[int, bytes] = {}

    def __getitem__(self, key: tuple[int, int]) -> Record:
        return Record(*pickle.loads(self._pickled[_one_number(key)]))

    def __setitem__(self, key: tuple[int, int], record: Record) -> None:
        self._pickled[_one_number(key)] = pickle.dumps(tuple(record), pickle.HIGHEST_PROTOCOL)

    def __delitem__(self, key: tuple[int, int]) -> None:
        del self._pickled[_one_number(key)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (divmod(number, MOST_ELEMENTS) for number in self._pickled)

    def __len__(self) -> int:
        return len(self._pickled)


def _one_number(key: tuple[int, int]) -> int:
    job, begin = key
    return job * MOST_ELEMENTS + begin


class Records:
    """A sink that nothing was written to earlier: it keeps the records of what is made, and none of the bytes."""

    def __init__(self) -> None:
        self.made = RecordTable()

    def record(self, job: int, begin: int) -> Record | None:
        """Return None: nothing was made earlier."""
        return None

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Return False: nothing can be read back."""
        return False

    def skew(self, tensor: str, offset: int) -> int:
        """Return 0: every place in a page is as good."""
        return 0

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Drop the bytes: they are known by their digest, which comes with ``done``."""

    def done(self, record: Record) -> None:
        """Keep what was made of a span."""
        self.made[record.job, record.begin] = record
