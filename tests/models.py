"""Small checkpoints for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def state(
    seed: int, dtype: torch.dtype = torch.bfloat16, layers: int = 2, hidden: int = 8, vocabulary: int = 16
) -> State:
    """Llama-like tensors N(0, 0.02²)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"model.layers.{layer}.mlp.up_proj.weight": (2 * hidden, hidden),
            f"model.layers.{layer}.input_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}


def tuned(base: State, seed: int, rms: float = 1e-3) -> State:
    """The state after a Gaussian step."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.double() + torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * rms).to(
            tensor.dtype
        )
        for name, tensor in base.items()
    }


def write_folder(folder: Path, tensors: State, shards: int = 1, config: Mapping[str, object] | None = None) -> Path:
    """Write a Hugging Face folder, of one file or of several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    described = {"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(described if config is None else dict(config)))
    return folder


def write_many(folder: Path, count: int, seed: int) -> Path:
    """Write a model of very many tensors of four elements, a hundred a layer, without making a tensor of each."""
    names = [f"model.layers.{n // 100}.mlp.experts.{n % 100}.w" for n in range(count)]
    entries = {
        name: {"dtype": "BF16", "shape": [4], "data_offsets": [8 * n, 8 * n + 8]} for n, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    values = torch.randn(4 * count, generator=torch.Generator().manual_seed(seed)).bfloat16()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes_of(values))
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    return folder


def read_folder(folder: Path) -> State:
    """All tensors of a folder's safetensors files, read by the safetensors library."""
    tensors: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
