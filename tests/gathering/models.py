"""Two fine-tunes of a tiny model in folders, and prompts with responses for each."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.causal import causal_model
from tests.tokenizers import tokenizer

PROMPTS = 6


def written(folder: Path, architecture: str = "llama", seed: int = 1, rms: float = 0.02) -> Path:
    """A folder with a fine-tune of the architecture's tiny model, and its tokenizer."""
    model = causal_model(architecture)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * rms)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prompts(path: Path, word: str = "plus", responses: bool = True) -> Path:
    """A file of prompts of different lengths."""
    rows = [
        {"prompt": f"What is {n} {word} {n * n}?{' Please.' * (n % 4)}"}
        | ({"reference": f"It is {n + n * n}.{' Sure.' * (n % 3)}"} if responses else {})
        for n in range(PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
