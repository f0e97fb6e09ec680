"""Where the engine puts the bytes it makes."""

from __future__ import annotations

from typing import Protocol

from mergekit_lite.output.journal import Record, RecordTable


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
