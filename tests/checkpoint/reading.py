"""Read a checkpoint back whole, and compare it with what another implementation read, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.checkpoint.reader import Reader


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor, in its shape."""
    tensors = {}
    with Reader() as reader:
        for name, spec in checkpoint.tensors.items():
            out = torch.empty(spec.numel, dtype=dtypes.torch_dtype(spec.dtype))
            spec.read(reader, 0, out)
            tensors[name] = out.view(spec.shape)
    return tensors


def assert_reads_as(path: Path, expected: Mapping[str, torch.Tensor]) -> Checkpoint:
    """Open and read ``path``; names, dtypes, shapes and bits are those expected."""
    checkpoint = open_checkpoint(path)
    found = read_all(checkpoint)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name
    return checkpoint


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
