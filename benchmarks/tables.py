"""A table that is printed on the screen and pasted into the README alike; and how figures are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; all columns but the first are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        ruler = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, ruler, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, ""])


def publish(
    folder: Path, name: str, heading: str, tables: Sequence[Table], notes: Sequence[str], data: Mapping[str, object]
) -> None:
    """Print the tables, and write them to ``NAME.md``, with all figures to ``NAME.json``."""
    text = "\n".join([heading, "", *(table.markdown() for table in tables), *(f"- {note}" for note in notes)])
    click.echo(text)
    (folder / f"{name}.md").write_text(f"{text}\n")
    everything = {**data, "tables": [asdict(table) for table in tables], "notes": notes}
    (folder / f"{name}.json").write_text(json.dumps(everything, indent=1))
    click.echo(f"Written: {folder / name}.md and .json.", err=True)


def size(nbytes: float) -> str:
    """``3.0 GB``, ``245 MB``."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, and the extremes where they differ: ``2.31 (2.20–2.43)``."""
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}–{most})"
