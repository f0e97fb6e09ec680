"""Write the tables of ``docs/training.md`` from their registries: ``python -m docs.training``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mergekit_lite.distillation.objectives.distance import Distance
from mergekit_lite.distillation.objectives.distances import DISTANCES
from mergekit_lite.distillation.objectives.preference import OBJECTIVES, Objective

PAGE = Path(__file__).with_suffix(".md")
NEEDS = {
    "same": "the same vocabulary",
    "map": "a map, or the same vocabulary",
    "projection": "a projection",
    "any": "",
}


def page() -> str:
    """Return the page as it is, with the tables as the registries have them."""
    text = PAGE.read_text(encoding="utf-8")
    text = _with_table(text, ("objective", "minimises", "when", "source (arXiv)"), map(_row, OBJECTIVES.values()))
    columns = ("distance", "of a group", "needs of the teacher", "when", "source (arXiv)")
    return _with_table(
        text, columns, ((*(row := _row(each))[:2], _needs(each), *row[2:]) for each in DISTANCES.values())
    )


def _row(each: Objective | Distance) -> tuple[str, ...]:
    return f"`{each.name}`", each.formula, each.when, each.source


def _needs(distance: Distance) -> str:
    what = "its likeliest tokens" if distance.top else "log p of the text"
    return "; ".join(filter(None, (what, NEEDS[distance.vocabulary])))


def _with_table(text: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return the text with its table of these columns' first name replaced."""
    lines = [columns, ("---",) * len(columns), *rows]
    table = "".join(f"| {' | '.join(row)} |\n" for row in lines)
    old = re.compile(rf"(?<=\n)\| {columns[0]} \|.*?\n(?=\n)", re.DOTALL)
    return old.sub(lambda _: table, text, count=1)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
