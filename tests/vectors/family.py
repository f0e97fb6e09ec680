"""A base and models made from it, for tests of task vectors."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.models import State, same_bytes, state, tuned, write_folder

Q = "model.layers.0.self_attn.q_proj"
BIG = "model.layers.1.mlp.down_proj.weight"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False}


def write_family(folder: Path) -> None:
    """A base (one tensor larger than a block), two models made from it, and another model."""
    base = state(0, hidden=64, vocabulary=48) | {BIG: torch.randn(1501, 1100).mul(0.02).bfloat16()}
    write_folder(folder / "base", base, shards=2, config=CONFIG)
    for number, name in enumerate(("math", "code"), start=1):
        write_folder(folder / name, tuned(base, number), config=CONFIG)
    write_folder(folder / "other", state(9, hidden=64, vocabulary=48) | {BIG: base[BIG]}, config=CONFIG)


def assert_same(found: State, expected: State) -> None:
    """Same names, same bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bytes(found[name], tensor), name


def distance(a: State, b: State) -> float:
    """‖a − b‖ over all tensors."""
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in b)) ** 0.5
