"""On-policy distillation of tiny models, for tests; ``main`` trains in a process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from mergekit_lite.distillation.on_policy.checks import check
from mergekit_lite.distillation.on_policy.stage import OnPolicyStage
from mergekit_lite.distillation.recipe.schema import Recipe
from tests.causal import causal_model
from tests.distill.training import Printing, Told
from tests.tokenizers import tokenizer

WORDS = ["one", "two", "three", "four", "five", "helpful", "What", "is"]
PLAIN = {"optim": "sgd", "max_grad_norm": 0}  # the trainer's arguments for a step of gradient descent
STAGE = {
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
}


def model_folder(folder: Path, made: Any, seed: int) -> Path:
    """A model with a tokenizer."""
    causal_model(seed=seed, vocabulary=len(made)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def teacher(folder: Path, seed: int = 1, made: Any = None, **changes: Any) -> dict[str, Any]:
    """A teacher with weights of its own, and the student's tokenizer unless told, as the recipe has it."""
    model_folder(folder, made or tokenizer(), seed)
    return {"name": folder.name, "model": str(folder), "batch_size": 4, **changes}


def recipe(
    folder: Path, teachers: list[dict[str, Any]], source: dict[str, Any] | None = None, **changes: Any
) -> Recipe:
    """Six prompts of two domains, two rounds of two steps; the target is in the folder."""
    if not (folder / "target").exists():
        model_folder(folder / "target", tokenizer(), 0)
    prompts = folder / "asked.jsonl"
    rows = [{"id": str(n), "prompt": f"What is {word}?", "domain": "ab"[n % 2]} for n, word in enumerate(WORDS[:6])]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "target", "model": "target", "batch_size": 4} if source is None else source
    made = {
        "folder": folder / "out",
        "target": str(folder / "target"),
        "prompts": [{"path": prompts}],
        "target_source": source,
        "teachers": teachers,
        "train": {"on_policy": STAGE | changes},
    }
    return Recipe.model_validate(made)


def trained(made: Recipe) -> Told:
    """Train, and return what was told."""
    told = Told()
    assert check(made) == []
    OnPolicyStage.of(made, made.target).run(told)
    return told


def rows(folder: Path, number: int, what: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a round's files."""
    place = folder / "out" / "train" / "on_policy.partial" / "rounds" / f"{number:04}" / what
    lines = [json.loads(line) for file in sorted(place.glob("*.jsonl")) for line in file.read_text().splitlines()]
    assert len({(line["prompt"], line["index"]) for line in lines}) == len(lines)
    return {(line["prompt"], line["index"]): line for line in lines}


def log_probs(model: Any, prompt: Any, response: Any) -> torch.Tensor:
    """log p of each token of a response, from whole logits."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(response)[:, None])[:, 0]


def main(path: str | Path) -> None:
    """Train by the recipe in a file, on the CPU."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    made = Recipe.model_validate_json(Path(path).read_text())
    OnPolicyStage.of(made, made.target).run(Printing())


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
