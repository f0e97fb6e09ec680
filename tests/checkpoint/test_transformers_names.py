"""Checkpoints of trainers under the names that transformers loads: the outputs compute what the trainers' models do."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.distributed import checkpoint as distributed
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError
from tests.checkpoint.reading import read_all

HEADS, KEYS, HIDDEN, LAYERS = 4, 2, 32, 2
HEAD = HIDDEN // HEADS
CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=KEYS, tie_word_embeddings=False, max_position_embeddings=64, architectures=["LlamaForCausalLM"],
)  # fmt: skip


def meta_llama(seed: int) -> dict[str, torch.Tensor]:
    """Weights under the names of Meta's Llama, which torchtitan uses."""
    torch.manual_seed(seed)
    shapes = {"tok_embeddings": (50, HIDDEN), "norm": (HIDDEN,), "output": (50, HIDDEN)}
    for layer in range(LAYERS):
        parts = {
            "attention.wq": (HIDDEN, HIDDEN), "attention.wk": (KEYS * HEAD, HIDDEN),
            "attention.wv": (KEYS * HEAD, HIDDEN), "attention.wo": (HIDDEN, HIDDEN), "feed_forward.w1": (48, HIDDEN),
            "feed_forward.w2": (HIDDEN, 48), "feed_forward.w3": (48, HIDDEN), "attention_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    return {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def meta_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """What Meta's Llama computes: rotary embeddings turn neighbouring rows as complex numbers (``llama/model.py``)."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG.rms_norm_eps) * weights[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turns = torch.outer(torch.arange(len(tokens)).float(), 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD))
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)[:, None]).flatten(2)

    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        of_layer = {part: weights[f"layers.{layer}.{part}.weight"] for part in ("attention.wq", "attention.wk",
            "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")}  # fmt: skip
        h = norm(x, f"layers.{layer}.attention_norm")
        q, k, v = (
            (h @ of_layer[f"attention.w{part}"].T).view(len(tokens), heads, HEAD)
            for part, heads in (("q", HEADS), ("k", KEYS), ("v", KEYS))
        )
        k, v = (each.repeat_interleave(HEADS // KEYS, 1) for each in (rotated(k), v))
        out = functional.scaled_dot_product_attention(
            *(each.transpose(0, 1) for each in (rotated(q), k, v)), is_causal=True
        )
        x = x + out.transpose(0, 1).reshape(len(tokens), -1) @ of_layer["attention.wo"].T
        h = norm(x, f"layers.{layer}.ffn_norm")
        gate = functional.silu(h @ of_layer["feed_forward.w1"].T) * (h @ of_layer["feed_forward.w3"].T)
        x = x + gate @ of_layer["feed_forward.w2"].T
    return norm(x, "norm") @ weights["output.weight"].T


def save(folder: Path, state: dict[str, object]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is one process
        distributed.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def refusal(reference: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(reference)
    return str(caught.value)


def test_a_llama_of_torchtitan_computes_the_same_in_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CONFIG.save_pretrained(tmp_path / "config")
    sft, aligned = meta_llama(1), meta_llama(2)
    save(tmp_path / "sft", {**sft, "optimizer": {"state.norm.weight.exp_avg": torch.ones(HIDDEN)}})
    save(tmp_path / "aligned", dict(aligned))
    arguments = ["extrapolate", "hf=config:sft", "hf=config:aligned", "-a", "0.5", "-o", "out"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = torch.arange(20) * 7 % 50
    expected = meta_logits({name: 1.5 * aligned[name] - 0.5 * sft[name] for name in sft}, tokens)
    with torch.no_grad():
        assert (model(tokens[None]).logits[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    result = CliRunner().invoke(main, ["verify", "out", "--all"], catch_exceptions=False)
    assert result.exit_code == 0 and "is sound" in result.output


def test_wrappers_are_taken_from_names(tmp_path):
    names = list(LlamaForCausalLM(CONFIG).state_dict())
    prefixes = ("", "module.", "_orig_mod.", "model.", "module._orig_mod.")
    for number, prefix in enumerate(prefixes):
        state = {prefix + name.replace("layers.1.", "layers.1._fsdp_wrapped_module."): torch.ones(1) for name in names}
        torch.save(state, tmp_path / f"{number}.pt")
    CONFIG.save_pretrained(tmp_path)
    for number, _ in enumerate(prefixes):
        assert list(open_checkpoint(f"hf:{tmp_path / str(number)}.pt").tensors) == names


def test_rows_are_read_in_any_pieces(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    weights = meta_llama(3)
    save(tmp_path / "step", dict(weights))
    name = "model.layers.0.self_attn.k_proj.weight"
    whole = read_all(checkpoint := open_checkpoint(f"hf:{tmp_path / 'step'}"))[name]
    assert checkpoint.folder == tmp_path and checkpoint.config is not None
    stored = weights["layers.0.attention.wk.weight"]
    assert torch.equal(whole, stored.view(KEYS, HEAD // 2, 2, HIDDEN).transpose(1, 2).reshape(-1, HIDDEN))


def test_what_does_not_map_is_refused(tmp_path):
    save(tmp_path / "a" / "b" / "step", dict(meta_llama(1)))
    step = tmp_path / "a" / "b" / "step"
    assert f"hf=FOLDER:{step}" in refusal(f"hf:{step}")
    for change, words in (({"model_type": "mistral"}, "'mistral'"), ({"num_hidden_layers": 3}, "has 2 layers")):
        LlamaConfig.from_dict(CONFIG.to_dict() | change).save_pretrained(tmp_path / "other")
        config = tmp_path / "other" / "config.json"
        config.write_text(config.read_text().replace('"llama"', f'"{change.get("model_type", "llama")}"'))
        assert words in refusal(f"hf={tmp_path / 'other'}:{step}")
