"""How stages report while they work. The command line prints the reports, a test may keep them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Advance(Protocol):
    """Tells that items of a task are done; ``note`` replaces the words that are shown beside its progress."""

    def __call__(self, more: int, note: str = "") -> None:
        """Tell it."""


class Reporter:
    """Takes the reports of a stage, and discards them: a subclass shows them. May be called from several threads."""

    def line(self, text: str) -> None:
        """Report a result, or that a step is done."""

    def warn(self, text: str) -> None:
        """Report what the user should look at, though the stage goes on."""

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Report a table. Columns whose heading begins with ``>`` are flush right."""

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Report the progress of a task; several may be open at once.

        Args:
            what: the task's name.
            total: its number of items.
            done: how many of them were done before.

        Returns:
            A context that gives a function to call with the number of items done since its last call.
        """
        return nullcontext(_discarded)


def _discarded(more: int, note: str = "") -> None:
    pass
