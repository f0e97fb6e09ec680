"""How models read: the options of every function that gathers statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from mergekit_lite.engine.devices import memory_left
from mergekit_lite.errors import UsageError
from mergekit_lite.gathering.examples import RESPONSE

SHARE = 0.5  # of the memory that is free beside the model, for matrices


class StatisticsOptions(TypedDict, total=False):
    """How models read: the options of ``gather_statistics`` and ``gather_statistics_plus``.

    Attributes:
        response: the column of the files that holds the responses, ``reference`` by default; Gram matrices are of
            prompts with theirs, where there are some.
        limit: most prompts that a model reads; by default all.
        device: ``cpu`` (the default), ``cuda``, ``cuda:1`` … or ``auto``.
        threads: workers that read the weights.
        batch_size: examples that are read at once for Gram matrices; 8 by default.
        memory: most bytes for matrices at once, of which more take further passes; by default half of what is free.
        force: replace files that exist, and drop other unfinished work on them.
        progress: called with (tokens read, tokens to read in all passes).
    """

    response: str
    limit: int | None
    device: str
    threads: int | None
    batch_size: int
    memory: int | None
    force: bool
    progress: Callable[[int, int], None] | None


@dataclass(frozen=True)
class Reading:
    """The options with their defaults. Raises UsageError where a number is none of its range."""

    response: str = RESPONSE
    limit: int | None = None
    device: str = "cpu"
    threads: int | None = None
    batch_size: int = 8
    memory: int | None = None
    force: bool = False
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        """Raise UsageError where a number is none of its range."""
        if any(number is not None and number < 1 for number in (self.batch_size, self.limit, self.memory)):
            raise UsageError("batch_size, limit and memory are whole numbers from 1 on.")

    def most(self, device: str) -> int:
        """Return how many bytes matrices may take at once on a device; asked when the model is in memory."""
        if self.memory is not None:
            return self.memory
        free = memory_left(device)
        return 1 << 32 if free is None else int(SHARE * free)


class Counted:
    """Tells ``progress`` of tokens that are read, of ``in_all``."""

    def __init__(self, reading: Reading, in_all: int) -> None:
        self._progress, self._in_all, self._done = reading.progress, in_all, 0

    def __call__(self, tokens: int) -> None:
        """Count tokens, and tell."""
        self._done += tokens
        if self._progress is not None:
            self._progress(self._done, self._in_all)
