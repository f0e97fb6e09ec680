"""Extrapolate the plain way: both models in memory, arithmetic in their own dtype.

python -m benchmarks.whole_models_in_memory SFT ALIGNED ALPHA OUTPUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def extrapolate(sft: Path, aligned: Path, alpha: float, output: Path) -> None:
    """Load both models whole, combine tensor by tensor, save the shards."""
    shards = {file.name: load_file(file) for file in sorted(aligned.glob("*.safetensors"))}
    start: dict[str, torch.Tensor] = {}
    for file in sorted(sft.glob("*.safetensors")):
        start |= load_file(file)
    output.mkdir()
    for name, shard in shards.items():
        for tensor, weight in shard.items():
            shard[tensor] = weight + alpha * (weight - start[tensor])
        save_file(shard, output / name, metadata={"format": "pt"})
    for file in aligned.glob("*.json"):
        shutil.copy(file, output)


if __name__ == "__main__":
    before, after, alpha, output = sys.argv[1:]
    extrapolate(Path(before), Path(after), float(alpha), Path(output))
