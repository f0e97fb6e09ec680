"""Tiny real models for the tests of boost, made by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128,
}  # fmt: skip


def write_pair(folder: Path, kind: str = "llama", dtype: str = "float32", **options: Any) -> tuple[Path, Path]:
    """A random model and the same after a small step, as folders ``sft`` and ``aligned``."""
    shard = options.pop("max_shard_size", "5GB")
    rms = options.pop("rms", 3e-3)
    torch.manual_seed(7)
    config = CONFIG_MAPPING[kind](**{**SIZE, **options, "dtype": dtype})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "sft", max_shard_size=shard)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * rms)
    model.save_pretrained(folder / "aligned", max_shard_size=shard)
    return folder / "sft", folder / "aligned"


def logits(model: Any) -> torch.Tensor:
    """What a model says to a fixed sequence."""
    with torch.no_grad():
        return model(torch.arange(1, 24)[None]).logits
