"""Tiny pairs of models in folders, for the tests of preview."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.causal import causal_model
from tests.tokenizers import tokenizer

STEP = 0.03  # of each weight, from SFT to ALIGNED


def write_pair(folder: Path, kind: str = "llama", only: str = "", **options: Any) -> tuple[Path, Path]:
    """Write a model and the same after a step; ``only`` is what the names of the moved tensors hold."""
    model = causal_model(kind, **options)
    _write(model, folder / "sft")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(torch.randn_like(parameter) * STEP)
    _write(model, folder / "aligned")
    return folder / "sft", folder / "aligned"


def write_model(folder: Path, kind: str = "llama", **options: Any) -> Path:
    """Write a model of another size or vocabulary."""
    _write(causal_model(kind, **options), folder)
    return folder


def load(folder: Path) -> Any:
    """The model, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(folder: Path, prompt: tuple[int, ...], most: int) -> list[int]:
    """What transformers' own ``generate`` writes after a prompt."""
    whole = load(folder).generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False)
    answer: list[int] = whole[0, len(prompt) :].tolist()
    return answer


def _write(model: Any, folder: Path) -> None:
    made = tokenizer()
    model.config.bos_token_id = None
    model.config.eos_token_id = model.generation_config.eos_token_id = made.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = made.pad_token_id
    model.save_pretrained(folder)
    made.save_pretrained(folder)
