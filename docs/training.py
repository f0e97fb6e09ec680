"""Write the table of objectives in ``docs/training.md`` from their registry: ``python -m docs.training``."""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_lite.distillation.objectives.preference import OBJECTIVES

PAGE = Path(__file__).with_suffix(".md")
TABLE = re.compile(r"(?<=\n)\| objective \|.*?\n(?=\n)", re.DOTALL)


def page() -> str:
    """Return the page as it is, with the table as the registry has it."""
    rows = [("objective", "minimises", "when", "source (arXiv)"), ("---",) * 4]
    rows += [(f"`{each.name}`", each.formula, each.when, each.source) for each in OBJECTIVES.values()]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return TABLE.sub(lambda _: table, PAGE.read_text(encoding="utf-8"), count=1)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
