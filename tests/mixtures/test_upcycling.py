"""Sparse upcycling: a mixture of copies answers as its dense model, and noise is what it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mergekit_lite.commands import main
from mergekit_lite.errors import PlanError, UsageError
from mergekit_lite.mixtures.building.upcycling import OF_KIND, plan_upcycle, upcycle
from mergekit_lite.verification import verify
from tests.mixtures.tiny import loaded, logits, made, weights

PAIRS = [*OF_KIND.items(), ("llama", "qwen2_moe")]


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_without_noise_it_answers_as_the_dense_model(kind: str, family: str, tmp_path: Path) -> None:
    dense = made(kind, tmp_path / "dense", torch.bfloat16)
    upcycle(str(dense), str(tmp_path / "mixture"), experts=4, experts_per_token=3, family=family)
    config = json.loads((tmp_path / "mixture" / "config.json").read_text())
    assert config["model_type"] == family
    torch.testing.assert_close(logits(tmp_path / "mixture"), logits(dense), atol=2e-5, rtol=2e-5)


def test_experts_are_copies_to_the_bit_and_what_is_drawn_depends_on_the_seed(tmp_path: Path) -> None:
    dense = made("qwen3", tmp_path / "dense", torch.bfloat16)
    own = weights(dense)
    outs = {}
    for name, options in {"plain": {}, "other": {"seed": 1}, "again": {"threads": 1}}.items():
        upcycle(str(dense), str(tmp_path / name), experts=3, **options)
        outs[name] = weights(tmp_path / name)
    for expert in range(3):
        for role in ("gate", "up", "down"):
            copy = outs["plain"][f"model.layers.1.mlp.experts.{expert}.{role}_proj.weight"]
            assert torch.equal(copy, own[f"model.layers.1.mlp.{role}_proj.weight"])
    routers = [outs[name]["model.layers.0.mlp.gate.weight"] for name in outs]
    assert torch.equal(routers[0], routers[2])
    assert not torch.equal(routers[0], routers[1])
    assert routers[0].shape == (3, 16)
    assert 0.2 < routers[0].abs().max() <= 0.25  # 1/√16


def test_noise_has_its_size_and_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    dense = made("llama", tmp_path / "dense", hidden_size=64, intermediate_size=256)
    for threads in (1, 3):
        upcycle(str(dense), str(tmp_path / f"by-{threads}"), experts=4, noise=0.01, threads=threads)
    one, three = weights(tmp_path / "by-1"), weights(tmp_path / "by-3")
    assert all(torch.equal(one[name], three[name]) for name in one)
    own = weights(dense)["model.layers.0.mlp.gate_proj.weight"].double()
    noise = [one[f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight"].double() - own for n in range(4)]
    for each in noise:
        assert each.mean().abs() < 5 * 0.01 / each.numel() ** 0.5
        assert abs(each.std() / 0.01 - 1) < 5 / (2 * each.numel()) ** 0.5
    assert abs(torch.corrcoef(torch.stack([each.flatten() for each in noise]))[0, 1]) < 5 / noise[0].numel() ** 0.5
    assert verify(tmp_path / "by-1", samples="all").findings == ()


def test_the_shared_expert_adds_nothing_and_can_be_trained(tmp_path: Path) -> None:
    upcycle(made("qwen2", tmp_path / "dense"), tmp_path / "out", experts=2)
    model = loaded(tmp_path / "out").train()
    model(torch.arange(8)[None]).logits.square().mean().backward()
    shared = model.model.layers[0].mlp.shared_expert
    assert not shared.down_proj.weight.any()
    assert shared.down_proj.weight.grad.any()


@pytest.mark.parametrize("family", ["qwen", "Qwen3 MoE", "qwen3-moe", None])
def test_a_family_is_named_as_in_recipes(family: str | None, tmp_path: Path) -> None:
    plan = plan_upcycle(str(made("qwen3", tmp_path / "dense")), "out", family=family)
    assert plan.config is not None and plan.config["model_type"] == "qwen3_moe"


def test_what_cannot_be(tmp_path: Path) -> None:
    dense = str(made("qwen3", tmp_path / "dense"))
    with pytest.raises(UsageError, match=r"Unknown family 'qwen4-moe'\. Did you mean 'qwen3_moe'"):
        plan_upcycle(dense, "out", family="qwen4-moe")
    with pytest.raises(PlanError, match=r"is of type qwen3: mixtures are made as Mixtral from llama, mistral$"):
        plan_upcycle(dense, "out", family="mixtral")
    for dtype, told in (("int8", "Unknown output dtype 'int8'"), ("fp8", "one of float64, .* got 'fp8'")):
        with pytest.raises(UsageError, match=told):
            plan_upcycle(dense, "out", dtype=dtype)
    with pytest.raises(UsageError, match="seed is a whole number from 0 on, got -1"):
        plan_upcycle(dense, "out", seed=-1)
    with pytest.raises(UsageError, match="1 to 2, got 3"):
        plan_upcycle(dense, "out", experts=2, experts_per_token=3)
    with pytest.raises(PlanError, match="mixtures are made of llama, mistral, qwen2, qwen3, olmo2"):
        plan_upcycle(str(made("qwen3_moe", tmp_path / "moe")), "out")


def test_the_command(tmp_path: Path) -> None:
    dense, out = str(made("mistral", tmp_path / "dense")), tmp_path / "out"
    arguments = ["upcycle", dense, "--experts", "2", "-o", str(out), "--json"]
    planned = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert not out.exists()
    assert "Warning" not in planned.stderr  # that all experts are the same is what was asked for
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (out / "config.json").exists()
    assert CliRunner().invoke(main, arguments).exit_code == 2  # it exists
