"""Recipes of tests, as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.distillation.recipe.schema import Recipe


def recipe_data(**changes: Any) -> dict[str, Any]:
    """A sound recipe of one served source."""
    return {
        "folder": "out",
        "target": "./target",
        "prompts": [{"path": "prompts.jsonl"}],
        "sources": [{"name": "a", "model": "m", "server": "http://127.0.0.1:9/v1"}],
        "scorers": [{"name": "right", "kind": "exact"}],
        "pairs": {"rule": "best_worst", "score": "right"},
        "train": {"sft": {"learning_rate": 1e-5}},
        **changes,
    }


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The same with changes, as a file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_data(**changes), sort_keys=False))
    return path


def recipe(folder: Path, **changes: Any) -> Recipe:
    """The same, loaded."""
    return load(write_recipe(folder, **changes))
