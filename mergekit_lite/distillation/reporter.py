"""What a stage tells while it works: the seam between the stages and whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Tell(Protocol):
    """Takes what a stage has to say. May be called from several threads."""

    def line(self, text: str) -> None:
        """A result or a step, in a line."""

    def warn(self, text: str) -> None:
        """Something the user should look at, though the stage goes on."""

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table. Headings that begin with ``>`` have their columns flush right."""

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Callable[[int], None]]:
        """Progress of a task of ``total`` items, ``done`` of which were there before; several may be open at once.

        Yields the function that is told how many more are done.
        """


class Silent:
    """Tells nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Counts nothing."""
        yield lambda more: None
