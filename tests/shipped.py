"""The recipes of the repository that `merge` takes."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
OTHERS = (
    "moe",
    "answer",
)  # folders of other commands' recipes: tests/mixtures and tests/answers/aggregating have those
FILES = sorted(path for path in (ROOT / "recipes").rglob("*.yml") if path.parent.name not in OTHERS)
