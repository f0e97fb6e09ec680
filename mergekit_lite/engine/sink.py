"""Where what the engine makes goes."""

from __future__ import annotations

from typing import Protocol

from mergekit_lite.output.journal import Record


class Sink(Protocol):
    """Where the bytes of one variant go: a ``OutputWorkspace``, or what only looks at them."""

    def record(self, job: int, begin: int) -> Record | None:
        """What is known of a span that was written earlier."""

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Read back what was written earlier; False where it is not all there."""

    def skew(self, tensor: str, offset: int) -> int:
        """How far behind the begin of a page of memory it would like to be given the byte at this offset."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Take bytes, ``offset`` bytes into a tensor."""

    def done(self, record: Record) -> None:
        """Take note that all of a span's bytes are written."""


class Records:
    """A destination that nothing was written to earlier: keeps the records of what is made, and none of the bytes."""

    def __init__(self) -> None:
        """Nothing made yet."""
        self.made: dict[tuple[int, int], Record] = {}

    def record(self, job: int, begin: int) -> Record | None:
        """Nothing was made earlier."""
        return None

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Nothing can be read back."""
        return False

    def skew(self, tensor: str, offset: int) -> int:
        """Anywhere."""
        return 0

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Bytes are known by their digest, which comes with ``done``."""

    def done(self, record: Record) -> None:
        """Keep what was made of a span."""
        self.made[record.job, record.begin] = record
