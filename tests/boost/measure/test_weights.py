"""Weights set in place are those of the written model, bit for bit, as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergekit_lite import plan_extrapolation, plan_merge, run
from mergekit_lite.errors import MergekitLiteError, PlanError, UsageError
from mergekit_lite.planning import Plan
from mergekit_lite.resident.model import build
from mergekit_lite.resident.weights import Weights
from tests.boost.tiny import logits, write_pair

CPU = "cpu"


def weights_for(plan: Plan) -> Weights:
    return Weights(build(plan, CPU), CPU)


def loaded(plan: Plan) -> Any:
    """The written model, as transformers loads it."""
    run(plan)
    return AutoModelForCausalLM.from_pretrained(plan.outputs[0], dtype="auto").eval()


def assert_same(model: Any, other: Any) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert torch.equal(logits(model), logits(other))


PAIRS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "tied": {"kind": "qwen2", "tie_word_embeddings": True, "dtype": "bfloat16"},
    "sharded": {"max_shard_size": "20KB"},
    "experts fused on loading": {"kind": "mixtral", "num_local_experts": 3, "dtype": "bfloat16"},
    "experts and a shared one": {
        "kind": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "names under a prefix": {"kind": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2},
    "phi3, projections fused in the checkpoint": {"kind": "phi3", "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS.keys())
def test_weights_in_place_are_those_of_the_written_model(tmp_path: Path, options: dict[str, Any]) -> None:
    sft, aligned = write_pair(tmp_path, **options)
    plans = {alpha: plan_extrapolation(sft, aligned, tmp_path / f"out-{alpha}", alpha) for alpha in (2.5, 0.0)}
    weights = weights_for(plans[2.5])
    for plan in plans.values():  # the second candidate over the first
        weights.set(plan)
        assert_same(weights.built.model, loaded(plan))
    assert torch.equal(
        logits(weights.built.model), logits(AutoModelForCausalLM.from_pretrained(aligned, dtype="auto").eval())
    )


def test_rounding_and_dtype_are_the_outputs(tmp_path: Path) -> None:
    sft, aligned = write_pair(tmp_path, dtype="bfloat16", rms=1e-4)
    for number, options in enumerate(
        [{"rounding": "stochastic", "seed": 3}, {"out_dtype": "float32"}, {"rounding": "nearest"}]
    ):
        plan = plan_extrapolation(sft, aligned, tmp_path / f"out-{number}", 0.3, **options)
        weights = weights_for(plan)
        rewritten = weights.set(plan)
        written = run(plan).reports[0]
        assert rewritten.report.effective == written.effective is not None
        assert_same(weights.built.model, AutoModelForCausalLM.from_pretrained(plan.outputs[0], dtype="auto").eval())


def test_a_merge_of_moved_layers_is_built_as_it_would_be_written(tmp_path: Path) -> None:
    sft, aligned = write_pair(tmp_path)
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(sft), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(aligned), "layer_range": [0, 2]}]},
        ],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    plan = plan_merge(tmp_path / "recipe.yml", tmp_path / "out")
    weights = weights_for(plan)
    weights.set(plan)
    assert weights.built.model.config.num_hidden_layers == 4
    assert_same(weights.built.model, loaded(plan))


def test_methods_that_gather_statistics_first(tmp_path: Path) -> None:
    sft, aligned = write_pair(tmp_path)
    for method, parameters in (("ties", {"density": 0.4}), ("dare_linear", {"density": 0.5})):
        recipe = {
            "merge_method": method,
            "models": [{"model": str(aligned), "parameters": {"weight": 0.7, **parameters}}],
            "base_model": str(sft),
            "seed": 5,
        }
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
        plan = plan_merge(tmp_path / "recipe.yml", tmp_path / method)
        weights = weights_for(plan)
        weights.set(plan)
        assert_same(weights.built.model, loaded(plan))


def test_a_head_that_one_model_ties_is_written_apart(tmp_path: Path) -> None:
    """The aligned model stores a head of its own though its config ties it: it may move away from the embedding."""
    sft, aligned = write_pair(tmp_path, kind="qwen2", tie_word_embeddings=True)
    state = load_file(aligned / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 0.5
    save_file(state, aligned / "model.safetensors", metadata={"format": "pt"})
    plan = plan_extrapolation(sft, aligned, tmp_path / "out", 0.5)
    weights = weights_for(plan)
    weights.set(plan)
    assert_same(weights.built.model, loaded(plan))


def test_generating_does_not_copy_the_head_for_each_row(tmp_path: Path) -> None:
    """Torch expands weights that need no gradients to the batch where the states are a slice, as they are there."""
    sft, aligned = write_pair(tmp_path, dtype="bfloat16", vocab_size=4096)
    plan = plan_extrapolation(sft, aligned, tmp_path / "out", 0.0)
    weights = weights_for(plan)
    weights.set(plan)
    rows = torch.ones(64, 3, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile, torch.inference_mode():
        weights.built.model(rows, logits_to_keep=1)
    head = weights.built.model.lm_head.weight
    most = max(event.self_cpu_memory_usage for event in profile.events())
    assert most < 8 * head.numel() * head.element_size()  # the logits are twice the head's size


def test_what_overflows_is_named(tmp_path: Path) -> None:
    sft, aligned = write_pair(tmp_path, dtype="float16", rms=0.5)
    plan = plan_extrapolation(sft, aligned, tmp_path / "out", 1e6)
    assert "model.norm.weight" in weights_for(plan).set(plan).nonfinite


def test_models_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    sft, aligned = write_pair(tmp_path)
    for folder in (sft, aligned):
        state = load_file(folder / "model.safetensors")
        del state["model.layers.1.mlp.up_proj.weight"]
        state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"][:40].contiguous()
        state["model.layers.0.extra.weight"] = torch.ones(3)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError) as refused:
        weights_for(plan_extrapolation(sft, aligned, tmp_path / "out", 0.5))
    assert "model.layers.1.mlp.up_proj.weight: the model has it" in str(refused.value)
    assert "model.layers.0.mlp.up_proj.weight: shape [40, 32]" in str(refused.value)


@pytest.mark.parametrize("kind, said", [("lama", "Did you mean 'llama'?"), ("vit", "no causal language model")])
def test_an_unknown_kind_of_model_is_refused(tmp_path: Path, kind: str, said: str) -> None:
    sft, aligned = write_pair(tmp_path)
    for model in (sft, aligned):
        config = (model / "config.json").read_text()
        (model / "config.json").write_text(config.replace('"model_type": "llama"', f'"model_type": "{kind}"'))
    with pytest.raises(UsageError, match=said.replace("?", "[?]")):
        weights_for(plan_extrapolation(sft, aligned, tmp_path / "out", 0.5))


def test_an_input_that_changed_is_told(tmp_path: Path) -> None:
    sft, aligned = write_pair(tmp_path)
    plan = plan_extrapolation(sft, aligned, tmp_path / "out", 0.5)
    weights = weights_for(plan)
    (sft / "model.safetensors").write_bytes((sft / "model.safetensors").read_bytes() + b"more")
    with pytest.raises(MergekitLiteError, match="changed since it was planned"):
        weights.set(plan)
