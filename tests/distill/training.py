"""A tiny target, rows to train it on, and a recipe; ``python -m tests.distill.training RECIPE`` trains in a process."""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.train import train
from tests.causal import causal_model
from tests.tokenizers import tokenizer

WORDS = ["one", "two", "three", "four", "five", "helpful", "user", "system", "assistant", "What", "is"]


def target(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A model folder, complete with a ChatML tokenizer."""
    model = causal_model(architecture)
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    tokenizer("chatml").save_pretrained(folder)
    return folder


def write_rows(
    folder: Path, sft: int = 24, preference: int = 24, chosen: tuple[str, ...] = ("source", "target")
) -> None:
    """``pairs/sft.jsonl`` and ``pairs/preference.jsonl`` of the distillation in a folder."""
    draws = torch.Generator().manual_seed(0)

    def text() -> str:
        length = int(torch.randint(2, 12, (), generator=draws))
        return " ".join(WORDS[int(word)] for word in torch.randint(0, len(WORDS), (length,), generator=draws))

    def response(role: str) -> dict[str, Any]:
        return {"text": text(), "source": role, "index": 0, "score": 1.0, "role": role}

    def row(number: int) -> dict[str, Any]:
        return {"prompt": str(number), "domain": "", "messages": [{"role": "user", "content": text()}]}

    rows = {
        "sft": [row(number) | {"response": text(), "source": "a", "index": 0, "score": 1.0} for number in range(sft)],
        "preference": [
            row(number) | {"chosen": [response(role) for role in chosen], "rejected": [response("target")]}
            for number in range(preference)
        ],
    }
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        (folder / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


STAGE = {"learning_rate": 1e-3, "batch_size": 4, "per_device_batch_size": 2, "dtype": "float32"}


def recipe(
    folder: Path,
    target: Path,
    sft: dict | None = None,
    preference: dict | None = None,
    fuse: dict | None = None,
    **more: Any,
) -> Recipe:
    """A recipe whose stages have what ``STAGE`` has, and what is given."""
    train = {"sft": sft, "fuse": fuse, "preference": preference}
    if preference is not None:
        train["preference"] = {"objective": "wrpo", **preference}
    return Recipe.model_validate(
        {
            "folder": folder,
            "target": str(target),
            "prompts": [],
            "sources": [],
            "scorers": [],
            "pairs": {"rule": "wrpo", "score": "any"},
            "train": {name: STAGE | stage for name, stage in train.items() if stage is not None},
            **more,
        }
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a trained stage's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], rtol: float = 0, atol: float = 0) -> None:
    """Two models have the same weights, bit for bit unless told."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


OF_THE_MACHINE = ("time", "tokens_per_second", "peak_memory")  # in the log


def figures(folder: Path) -> list[dict[str, float]]:
    """The rows of a trained stage's log without what depends on the machine."""
    return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in log(folder)]


class Printing(Reporter):
    """Prints lines at once."""

    def line(self, text: str) -> None:
        print(text, flush=True)


def hold_threads() -> None:
    """End with a code of its own where threads of gloo are left: once Python has ended they may abort the process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if left := [name for name in names if "gloo_runloop" in name]:
        print(f"left: {left}", file=sys.stderr, flush=True)
        os._exit(7)


def main(path: str | Path) -> None:
    """Train by the recipe in a file, on the CPU."""
    atexit.register(hold_threads)  # the first one, which is called last
    os.environ["ACCELERATE_USE_CPU"] = "true"
    train(Recipe.model_validate_json(Path(path).read_text()), Printing())


class Told(Reporter):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    warn = line


def trained(folder: Path, **stages: Any) -> Told:
    """Train the folder's target, and return what was told."""
    told = Told()
    train(recipe(folder, folder / "target", **stages), told)
    return told


if __name__ == "__main__":
    main(sys.argv[1])
