"""A table that is printed on the screen and pasted into the README alike; and how figures are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; all columns but the first are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As a Markdown table."""
        ruler = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, ruler, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, ""])

    def show(self) -> None:
        """On the screen."""
        from rich.console import Console
        from rich.table import Table as Screen

        screen = Screen(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            screen.add_column(column, justify="right" if number else "left", no_wrap=bool(number))
        for row in self.rows:
            screen.add_row(*row)
        Console(highlight=False).print(screen)


def size(nbytes: float) -> str:
    """``3.0 GB``, ``245 MB``."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and where they differ the least and the most: ``2.31 (2.20–2.43)``."""
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}–{most})"
