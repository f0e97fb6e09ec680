"""Small PEFT adapters for tests, made by hand, and what they come to, worked out whole in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergekit_lite.checkpoint import open_checkpoint
from tests.checkpoint.reading import read_all
from tests.models import State, write_folder

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
PREFIX = "base_model.model."


def lora(
    module: str, out: int, columns: int, rank: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
) -> State:
    """The factors of one linear layer, N(0, 0.1²)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": (torch.randn(rank, columns, generator=generator) * 0.1).to(dtype),
        f"{PREFIX}{module}.lora_B.weight": (torch.randn(out, rank, generator=generator) * 0.1).to(dtype),
    }


def write_adapter(folder: Path, tensors: State, *, file: str = "adapter_model.safetensors", **changes: object) -> Path:
    """Write an adapter folder; ``changes`` are of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    else:
        torch.save(tensors, folder / file)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def folded(base: State, tensors: State, alpha: float = 8, rank_stabilised: bool = False) -> dict[str, torch.Tensor]:
    """The base with every linear LoRA added, in float64, unrounded."""
    result = {name: tensor.double() for name, tensor in base.items()}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            scale = alpha / (math.sqrt(len(a)) if rank_stabilised else len(a))
            target = name.removeprefix(PREFIX).replace("lora_A.", "")
            result[target] = result[target] + scale * (b.double() @ a.double())
    return result


def over(tmp_path: Path, base: State, tensors: State, **changes: object) -> dict[str, torch.Tensor]:
    """What is read of a base with an adapter over it, both written to ``tmp_path``; ``changes`` are of its config."""
    write_folder(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", tensors, **changes)
    return read_all(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))
