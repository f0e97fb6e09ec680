"""GGUF files made of models as llama.cpp's converter makes them: a second implementation of what is undone on reading.

Its classes are in the folder ``conversion`` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

State = Mapping[str, torch.Tensor]
EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.*)")


def write_gguf(
    path: Path, architecture: str, state: State, values: Mapping[str, Any], kind: str = "F32", **more: np.ndarray
) -> Path:
    """Convert a model: matrices in the type ``kind``, vectors in float32; ``more`` are tensors of other names."""
    writer = gguf.GGUFWriter(path, architecture)
    add_values(writer, architecture, values)
    for name, array in converted(architecture, state, values).items():
        add(writer, name, array, kind if array.ndim > 1 else "F32")
    for name, array in more.items():
        add(writer, name.replace("__", "."), array, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_values(writer: gguf.GGUFWriter, architecture: str, values: Mapping[str, Any]) -> None:
    """Add whole numbers, fractions, texts and lists of texts; keys that begin with a dot are the architecture's."""
    for key, value in values.items():
        key = architecture + key if key.startswith(".") else key
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    """Add a tensor in a type that the package can quantise to."""
    quantised = gguf.quantize(array, gguf.GGMLQuantizationType[kind])
    writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType[kind])


def converted(architecture: str, state: State, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors by llama.cpp's names: permuted, with one added, experts in stacks."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = 1 + max(int(match[1]) for match in (re.search(r"layers\.(\d+)\.", name) for name in state) if match)
    table = gguf.get_tensor_name_map(kind, layers)
    stacks: dict[str, list[np.ndarray]] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        array = tensor.detach().float().numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
            array = permuted(array, values[".attention.head_count"])
        if architecture == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
            array = permuted(array, values[".attention.head_count_kv"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if expert := EXPERT.fullmatch(name):
            merged = f"{expert[1]}.{expert[2]}"
            if architecture == "llama":
                merged = merged.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
            stacks.setdefault(merged, []).append(array)
        else:
            arrays[table.get_name(name, (".weight", ".bias"))] = array
    arrays |= {table.get_name(name, (".weight",)): np.stack(stack) for name, stack in stacks.items()}
    return arrays


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows with each head's rotary pairs side by side (``LlamaModel.permute``)."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
