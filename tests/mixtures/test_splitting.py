"""A dense model of an expert: bit for bit where it came from one, and what a naive mean gives otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mergekit_lite import build_moe, split_experts
from mergekit_lite.commands import main
from mergekit_lite.engine.run import run
from mergekit_lite.errors import CheckpointError, PlanError, UsageError
from mergekit_lite.mixtures.splitting import plan_split
from mergekit_lite.verification import verify
from tests.mixtures.tiny import loaded, logits, made, weights

KINDS = [("mistral", "mixtral"), ("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("llama", "qwen2_moe"),
         ("qwen3", "qwen3_moe"), ("olmo2", "flex_olmo"), ("llama", "deepseek")]  # fmt: skip


def built(kind: str, family: str, folder: Path) -> list[Path]:
    """Build ``folder/mixture`` of two dense models, and return these."""
    dense = [made(kind, folder / f"dense-{n}", torch.bfloat16, seed=n) for n in range(2)]
    recipe = {
        "base_model": str(dense[0]),
        "gate_mode": "random",
        "architecture": family,
        "experts": [{"source_model": str(each)} for each in dense],
    }
    if family == "qwen2_moe":
        recipe["shared_experts"] = [{"source_model": str(dense[1])}]
    build_moe(recipe, folder / "mixture")
    return dense


@pytest.mark.parametrize(("kind", "family"), KINDS)
def test_a_mixture_of_dense_models_gives_them_back(kind: str, family: str, tmp_path: Path) -> None:
    dense = built(kind, family, tmp_path)
    run(plan_split(str(tmp_path / "mixture"), [0], tmp_path / "first"))
    run(plan_split(str(tmp_path / "mixture"), [1], tmp_path / "second"))
    first, second, own, other = (weights(f) for f in (tmp_path / "first", tmp_path / "second", *dense))
    if (kind, family) == ("llama", "qwen2_moe"):  # it has biases, here of zeros
        assert not any(first.pop(name).any() for name in [*first] if name.endswith("bias"))
    assert first.keys() == own.keys()
    assert all(torch.equal(first[name], own[name]) for name in own)
    assert all(torch.equal(second[name], other[name]) for name in other if ".mlp." in name)
    assert all(torch.equal(second[name], own[name]) for name in own if ".mlp." not in name)
    torch.testing.assert_close(logits(tmp_path / "first"), logits(dense[0]), atol=0, rtol=0)
    assert verify(tmp_path / "second", samples="all").findings == ()


def test_the_shared_expert_is_told_and_can_be_split_off(tmp_path: Path) -> None:
    dense = built("qwen2", "qwen2_moe", tmp_path)
    plan = plan_split(str(tmp_path / "mixture"), [0], tmp_path / "out")
    assert any("the shared expert is left out" in note for note in plan.notes)
    assert len(plan.left_out) == 2 * (3 + 3 + 2)  # the other expert, the shared one, both routers; of each layer
    run(plan_split(str(tmp_path / "mixture"), ["shared"], tmp_path / "shared"))
    shared, other = weights(tmp_path / "shared"), weights(dense[1])
    assert all(torch.equal(shared[name], other[name]) for name in other if ".mlp." in name)
    with pytest.raises(UsageError, match="split off alone"):
        plan_split(str(tmp_path / "mixture"), [0, "shared"], "out")


def test_shared_experts_without_a_gate_stand_beside_the_expert(tmp_path: Path) -> None:
    dense = [made("llama", tmp_path / f"dense-{n}", seed=n) for n in range(2)]
    experts = [{"source_model": str(each)} for each in dense]
    recipe = {"base_model": str(dense[0]), "gate_mode": "random", "architecture": "deepseek", "experts": experts,
              "shared_experts": [{"source_model": str(dense[1])}]}  # fmt: skip
    build_moe(recipe, tmp_path / "mixture")
    run(plan_split(str(tmp_path / "mixture"), [0, 1], tmp_path / "out"))
    out, (one, other) = weights(tmp_path / "out"), [weights(each) for each in dense]
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(out[up], torch.cat([((one[up].double() + other[up].double()) / 2).float(), other[up]]))
    assert torch.equal(out[down][:, 24:], other[down])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 48
    logits(tmp_path / "out")


@pytest.mark.parametrize("layout", ["apart", "together"])
def test_means_of_experts_in_both_layouts(layout: str, tmp_path: Path) -> None:
    mixture = made("qwen3_moe", tmp_path / "mixture", torch.bfloat16, apart=layout == "apart")
    apart = weights(made("qwen3_moe", tmp_path / "apart", torch.bfloat16))
    split_experts(mixture, [4, 1], tmp_path / "out", weights=[0.75, 0.25])
    out = weights(tmp_path / "out")
    for role in ("gate", "up", "down"):
        experts = [apart[f"model.layers.0.mlp.experts.{n}.{role}_proj.weight"].float() for n in (4, 1)]
        mean = (experts[0] * 0.75 + experts[1] * 0.25).bfloat16()
        assert torch.equal(out[f"model.layers.0.mlp.{role}_proj.weight"], mean)
    logits(tmp_path / "out")


def test_what_cannot_be(tmp_path: Path) -> None:
    mixture = str(made("mixtral", tmp_path / "mixture"))
    with pytest.raises(UsageError, match="experts 0 to 5, there is no expert 6"):
        plan_split(mixture, [6], "out")
    with pytest.raises(UsageError, match="single file"):
        plan_split(mixture, [0], "out.safetensors")
    for weight in ("nan", "inf"):
        with pytest.raises(UsageError, match="no finite number"):
            plan_split(mixture, [0, 1], "out", weights=[float(weight), 1.0])
    with pytest.raises(CheckpointError, match="has no experts"):
        plan_split(str(made("llama", tmp_path / "dense")), [0], "out")
    with pytest.raises(PlanError, match="deepseek_v3: its dense model isn't known"):
        plan_split(str(made("deepseek_v3", tmp_path / "v3")), [0], "out")
    uneven = made("qwen3_moe", tmp_path / "uneven", mlp_only_layers=[0])
    with pytest.raises(PlanError, match="widths 12 and 24"):
        plan_split(str(uneven), [0], "out")


def test_the_command_makes_a_folder_for_each_expert(tmp_path: Path) -> None:
    mixture = str(made("mixtral", tmp_path / "mixture"))
    arguments = ["moe", "split", mixture, "--experts", "0,5", "-o", f"{tmp_path}/out-{{expert}}", "-q"]
    (tmp_path / "out-5").mkdir()
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert not (tmp_path / "out-0").exists()  # nothing is written before all is sound
    (tmp_path / "out-5").rmdir()
    made_all = CliRunner().invoke(main, arguments)
    assert made_all.exit_code == 0, made_all.output
    assert all((tmp_path / f"out-{n}" / "config.json").exists() for n in (0, 5))
    assert CliRunner().invoke(main, ["moe", "split", mixture, "--experts", "one", "-o", "x"]).exit_code == 2
    several = CliRunner().invoke(main, [*arguments, "--json", "--force"])
    assert (several.exit_code, "--json tells of one output" in several.output) == (2, True)
    one = CliRunner().invoke(main, [*(part.replace("0,5", "3") for part in arguments), "--json"])
    assert json.loads(one.stdout)["outputs"][0]["path"] == f"{tmp_path}/out-3"


def test_what_a_config_leaves_to_its_class_is_said(tmp_path: Path) -> None:
    """The dense class takes other things for granted: 128 for the size of heads, a window of 4,096 tokens."""
    for kind, unsaid in (("qwen3_moe", ("head_dim",)), ("mixtral", ("sliding_window", "head_dim", "rms_norm_eps"))):
        mixture = made(kind, tmp_path / kind)
        config = json.loads((mixture / "config.json").read_text())
        for key in unsaid:
            config.pop(key, None)
        (mixture / "config.json").write_text(json.dumps(config))
        run(plan_split(str(mixture), [0], tmp_path / f"{kind}-0"))
        dense = loaded(tmp_path / f"{kind}-0").config
        before = loaded(mixture).config
        assert dense.rms_norm_eps == before.rms_norm_eps
        assert dense.sliding_window is None
        assert dense.rope_parameters == before.rope_parameters
        assert dense.head_dim in (None, 4)
