"""Mixtures merged with each other: expert by expert, however they are stored; and told where these are permuted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite import compare, merge
from tests.mixtures.tiny import loaded, made, weights


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_any_method_merges_each_expert_however_it_is_stored(kind: str, tmp_path: Path) -> None:
    apart = [str(made(kind, tmp_path / f"apart-{n}", seed=n)) for n in range(3)]
    together = [str(made(kind, tmp_path / f"together-{n}", seed=n, apart=False)) for n in range(3)]
    for name, models in (("apart", apart), ("mixed", [apart[0], *together[1:]]), ("together", together)):
        listed = [{"model": model, "parameters": {"weight": 0.6, "density": 0.4}} for model in models[1:]]
        merge({"merge_method": "ties", "base_model": models[0], "models": listed}, tmp_path / name)
    states = [loaded(tmp_path / name).state_dict() for name in ("apart", "mixed", "together")]
    assert weights(tmp_path / "apart").keys() == weights(Path(apart[0])).keys()
    assert weights(tmp_path / "together").keys() == weights(Path(together[0])).keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # A threshold is that of a tensor: of an expert's matrix, or of a stack of them.
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0] if "experts" in name)
    assert all(torch.equal(states[0][name], states[2][name]) for name in states[0] if "experts" not in name)
    for name, models in (("apart", apart), ("together", together)):
        merge({"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models]},
              tmp_path / f"mean-{name}")  # fmt: skip
    one, other = loaded(tmp_path / "mean-apart").state_dict(), loaded(tmp_path / "mean-together").state_dict()
    own = [loaded(Path(each)).state_dict() for each in apart]
    for name in one:
        torch.testing.assert_close(one[name], sum(each[name] for each in own) / 3)
        assert torch.equal(one[name], other[name])


def test_permuted_experts_are_told(tmp_path: Path) -> None:
    base = made("mixtral", tmp_path / "base")
    state, moved = weights(base), made("mixtral", tmp_path / "moved")
    order = [0, 3, 2, 5, 4, 1]
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe"
        own = {name: tensor for name, tensor in state.items() if name.startswith(block)}
        state[f"{block}.gate.weight"] = own[f"{block}.gate.weight"][order].contiguous()
        for number, before in enumerate(order):
            for role in ("w1", "w2", "w3"):
                state[f"{block}.experts.{number}.{role}.weight"] = own[f"{block}.experts.{before}.{role}.weight"]
    save_file(state, moved / "model.safetensors", {"format": "pt"})
    (note,) = [note for note in compare(base, [moved]).notes if "other numbers" in note]
    assert "2 of 2 layers" in note
    assert "1 → 5, 3 → 1, 5 → 3" in note
    assert not any("other numbers" in note for note in compare(base, [base]).notes)
