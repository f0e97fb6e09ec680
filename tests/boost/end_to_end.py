"""Tiny models with tokenizers, prompts and pairs, for whole boosts; and scorers that are found by their names."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch

from tests.causal import causal_model
from tests.tokenizers import tokenizer


def write_models(root: Path, rms: float = 0.01, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """``sft`` and ``dpo`` with a chat template each."""
    model = causal_model("llama").to(dtype)
    for name in ("sft", "dpo"):
        model.save_pretrained(root / name)
        tokenizer("chatml").save_pretrained(root / name)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * rms)
    return root / "sft", root / "dpo"


def write_prompts(root: Path, count: int = 24) -> Path:
    path = root / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "prompt": f"What is {i}?"}) + "\n" for i in range(count)))
    return path


def write_pairs(root: Path, count: int = 24) -> Path:
    path = root / "pairs.jsonl"
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "no no two"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spaces(completions: list[str], **columns: object) -> list[float]:
    """How often an answer has a blank: as good a score as any."""
    return [answer.count(" ") for answer in completions]


def slow_and_logged(completions: list[str], id: list[str], **columns: object) -> list[float]:
    """The same, written down, so that a test sees what was scored; slow, so that it can be killed meanwhile."""
    with Path(os.environ["SCORED"]).open("a") as file:
        file.writelines(json.dumps([prompt, answer]) + "\n" for prompt, answer in zip(id, completions, strict=True))
    time.sleep(0.02 * len(id))
    return [answer.count(" ") for answer in completions]


def mortal(completions: list[str], id: list[str], **columns: object) -> list[float]:
    """The same as ``spaces``; notes its process, and kills it where it scores ``q7``, once or always, if told to."""
    with Path(os.environ["PROCESSES"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    marker = os.environ.get("DIES")
    if marker and "q7" in id and (marker == "always" or not Path(marker).exists()):
        if marker != "always":
            Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(os.environ.get("SECONDS", "0")))
    return [answer.count(" ") for answer in completions]


def broken(completions: list[str], **columns: object) -> list[float]:
    """A mistake of the user's."""
    return [1 / 0 for _ in completions]
