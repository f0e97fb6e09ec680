"""What ``inspect`` tells of models that are sound, and of models with one thing wrong each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mergekit_lite.commands import main
from mergekit_lite.comparison import survey
from mergekit_lite.comparison.inspection import inspect
from tests.models import State, state, write_folder

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
Q = "model.layers.2.self_attn.q_proj.weight"


def written(folder: Path, tensors: State | None = None, **config: object) -> Path:
    return write_folder(folder / "model", tensors or state(0, layers=4), shards=2, config={**CONFIG, **config})


def test_a_sound_model_has_no_doubts(tmp_path: Path) -> None:
    path = written(tmp_path)
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {chr(97 + n): n for n in range(16)}}}))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    found = inspect(path, stats=True)
    assert found.doubts == () and found.stacks == {"model.layers": 4}
    assert found.parameters == sum(tensor.numel() for tensor in state(0, layers=4).values())
    assert found.dtypes == {"bfloat16": found.parameters} and found.nbytes == 2 * found.parameters
    assert found.tied == "no: lm_head.weight" and found.quantised == "no"
    assert found.tokenizer["vocabulary"] == "16 tokens, numbers up to 15"
    assert found.tokenizer["chat template"] == "14 characters"
    assert {module.name: module.tensors for module in found.groups}["model.layers.*.mlp.up_proj"] == 4


def reshaped(tensors: State) -> None:
    tensors[Q] = torch.ones(8, 6).bfloat16()


def lacking(tensors: State) -> None:
    del tensors[Q]


def gap(tensors: State) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def headless(tensors: State) -> None:
    del tensors["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        (reshaped, {}, "model.layers.2.self_attn.q_proj.weight: shape [8, 6], in the other layers [8, 8]"),
        (lacking, {}, "model.layers.2: lacks 1 tensor that layers like it have: self_attn.q_proj.weight"),
        (gap, {}, "model.layers: of the layers 0 to 3, 1 have no tensors"),
        (headless, {}, "tie_word_embeddings is false, but there is no output head"),
        (None, {"tie_word_embeddings": True}, "tie_word_embeddings is true, but lm_head.weight is stored"),
        (None, {"num_hidden_layers": 5}, "num_hidden_layers is 5, the tensors have model.layers: 4"),
        (None, {"vocab_size": 17}, "vocab_size is 17, but model.embed_tokens.weight has 16 rows"),
        (None, {"hidden_size": 9}, "hidden_size is 9, but model.embed_tokens.weight has 8 columns"),
        (None, {"num_attention_heads": 8, "head_dim": 4}, "num_attention_heads makes 8 × 4 rows"),
        (None, {"intermediate_size": 24}, "intermediate_size makes 24 rows"),
        (None, {"torch_dtype": "float16"}, "the dtype is float16, the tensors are bfloat16"),
        (None, {"text_config": {"hidden_size": 8, "num_hidden_layers": 6}}, "num_hidden_layers is 6"),
    ],
)
def test_what_looks_wrong_in_headers(
    change: Callable[[State], None] | None, config: dict[str, object], told: str, tmp_path: Path
) -> None:
    tensors = state(0, layers=4)
    if change is not None:
        change(tensors)
    doubts = inspect(written(tmp_path, tensors, **config)).doubts
    assert any(told in doubt for doubt in doubts), doubts
    assert len(doubts) == 1 or change is gap, doubts


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["LlamaModel"]},
        {"tie_word_embeddings": True, "text_config": {"hidden_size": 8, "tie_word_embeddings": False}},
        {"tie_word_embeddings": None, "text_config": {"hidden_size": 8, "tie_word_embeddings": False}},
    ],
)
def test_models_without_a_head_of_tokens_lack_none(config: dict[str, object], tmp_path: Path) -> None:
    tensors = state(0, layers=4)
    headless(tensors)
    assert inspect(written(tmp_path, tensors, **config)).doubts == ()
    tensors["language_model.lm_head.weight"] = torch.ones(16, 8).bfloat16()
    assert not [doubt for doubt in inspect(written(tmp_path, tensors)).doubts if "no output head" in doubt]


@pytest.mark.parametrize(
    ("wrapped", "prefixes"),
    [
        ("_orig_mod.{}", ["_orig_mod."]),
        ("module.{}", ["module."]),
        ("_orig_mod.module.{}", ["_orig_mod.", "module."]),
        ("model._fsdp_wrapped_module.{}", ["_fsdp_wrapped_module."]),
        ("model.layers.0._orig_mod.{}", ["_orig_mod."]),
        ("vision.module.{}", []),
        ("model.module_list.{}", []),
    ],
)
def test_prefixes_of_wrappers(wrapped: str, prefixes: list[str], tmp_path: Path) -> None:
    tensors = {wrapped.format(name): tensor for name, tensor in state(0, layers=1).items()}
    doubts = inspect(write_folder(tmp_path / "model", tensors, config={})).doubts
    assert [doubt for doubt in doubts if "transformers finds no weights under such names" in doubt] == list(doubts)
    assert [doubt.split("'")[1] for doubt in doubts] == prefixes


def test_layers_that_differ_by_design_are_no_doubt(tmp_path: Path) -> None:
    """A dense first layer before mixtures of experts, and every other layer another kind."""
    tensors = {"model.embed_tokens.weight": torch.ones(16, 8).bfloat16()}
    for layer in range(12):
        kind = "mlp.up_proj.weight" if layer == 0 else "mlp.experts.0.up_proj.weight"
        mixer = "mamba.in_proj.weight" if layer % 2 else "self_attn.o_proj.weight"
        tensors |= {f"model.layers.{layer}.{rest}": torch.ones(8, 8).bfloat16() for rest in (kind, mixer)}
    assert inspect(write_folder(tmp_path / "model", tensors, config={"num_hidden_layers": 12})).doubts == ()


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path: Path) -> None:
    path = written(tmp_path)
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(n): n for n in range(20)}}}))
    assert inspect(path).doubts == ("tokenizer.json: has tokens up to number 19, the embedding has 16 rows",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_against_their_definitions(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CHUNK", 64), ("STATISTICS_BLOCK", 16), ("SECTION", 64)):
        monkeypatch.setattr(survey, name, value)
    tensors = state(3, dtype, layers=4)
    tensors[Q][2] = 0
    tensors[Q][5] = 0
    tensors["lm_head.weight"][1, 2] = math.nan
    tensors["lm_head.weight"][1, 3:5] = -math.inf
    tensors["model.norm.weight"][:] = 0
    tensors["model.embed_tokens.weight"][0, 0] = 1e30  # its square is beyond float32
    found = inspect(written(tmp_path, tensors, torch_dtype=str(dtype).split(".")[1]), stats=True)
    assert found.weights is not None and len(found.weights) == len(tensors)
    for got in found.weights:
        tensor = tensors[got.name].double()
        finite = tensor[tensor.isfinite()]
        assert (got.nan, got.infinite) == (int(tensor.isnan().sum()), int(tensor.isinf().sum()))
        assert got.mean == pytest.approx(float(finite.mean()), abs=1e-12)
        assert got.rms == pytest.approx(float(finite.square().mean().sqrt()))
        assert got.largest == float(finite.abs().max())
        assert got.dead_rows == (int((tensor == 0).all(1).sum()) if tensor.ndim == 2 else None)
    assert set(found.doubts) == {
        f"{Q}: 2 rows all zero",
        "lm_head.weight: 1 weight NaN, 2 weights infinite",
        "model.norm.weight: all weights are zero",
    }


def test_the_command(tmp_path: Path) -> None:
    path = written(tmp_path, vocab_size=17)
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 0 and "model.layers.*.mlp.up_proj" in result.stdout and "vocab_size" in result.stderr
    result = CliRunner().invoke(main, ["inspect", str(path), "--stats", "--json"])
    data = json.loads(result.stdout)
    assert len(data["doubts"]) == 1 and data["tensors"][0]["rms"] > 0 and data["stacks"] == {"model.layers": 4}
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "nowhere")])
    assert result.exit_code == 1 and "nowhere" in result.stderr
