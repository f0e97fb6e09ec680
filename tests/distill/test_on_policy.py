"""On-policy distillation on tiny models: its rounds, what it writes and refuses, and that a kill costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lite.distillation.on_policy.checks import check
from mergekit_lite.distillation.on_policy.stage import OnPolicyStage
from mergekit_lite.distillation.recipe.schema import Recipe
from tests.causal import causal_model
from tests.distill.training import Told, log, target
from tests.tokenizers import tokenizer

WORDS = ["one", "two", "three", "four", "five", "helpful", "What", "is"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def teacher(folder: Path, seed: int = 1, style: str = "chatml", **changes: Any) -> dict[str, Any]:
    """A teacher with weights of its own, as the recipe has it."""
    causal_model(seed=seed).save_pretrained(folder)
    tokenizer(style).save_pretrained(folder)
    return {"name": folder.name, "model": str(folder), "batch_size": 4, **changes}


def recipe(folder: Path, teachers: list[dict[str, Any]], **changes: Any) -> Recipe:
    """Six prompts of two domains, two rounds of two steps."""
    prompts = folder / "asked.jsonl"
    rows = [{"id": str(n), "prompt": f"What is {word}?", "domain": "ab"[n % 2]} for n, word in enumerate(WORDS[:6])]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "learning_rate": 1e-3,
        "batch_size": 4,
        "per_device_batch_size": 2,
        "dtype": "float32",
        "scheduler": "constant",
        "warmup_ratio": 0,
        "rounds": 2,
        "prompts": 4,
        "samples": 2,
        "max_length": 200,
        "sampling": {"max_tokens": 12},
        **changes,
    }
    made = {
        "folder": folder / "out",
        "target": str(folder / "target"),
        "prompts": [{"path": prompts}],
        "target_source": {"name": "target", "model": "target", "batch_size": 4},
        "teachers": teachers,
        "train": {"on_policy": settings},
    }
    return Recipe.model_validate(made)


def trained(made: Recipe) -> Told:
    told = Told()
    assert check(made) == []
    OnPolicyStage.of(made, made.target).run(told)
    return told


@pytest.fixture
def folder(tmp_path):
    target(tmp_path / "target")
    return tmp_path


def test_rounds(folder):
    told = trained(recipe(folder, [teacher(folder / "strong")]))
    print(told.lines)
    made = folder / "out" / "train" / "on_policy"
    rows = log(made)
    for row in rows:
        print(row)
    assert [row["round"] for row in rows] == [1, 1, 2, 2]
    assert rows[0]["ratio"] == rows[2]["ratio"] == 1 != rows[1]["ratio"]
