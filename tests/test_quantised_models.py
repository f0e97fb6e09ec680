"""Quantised models as inputs, from end to end: a quantised base and a plain fine-tune become a model that loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import mergekit_lite
from mergekit_lite.commands import main


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Return numbers from −8 to 7 (rows, columns), eight of them in a word."""
    return ((codes.to(torch.int64) + 8).view(len(codes), -1, 8) << 4 * torch.arange(8)).sum(-1).to(torch.int32)


def quantise(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """Write a Llama's projections as compressed-tensors packs them, in groups of 32. Return all values they stand for."""
    values, stored = load_file(folder / "model.safetensors"), {}
    for name, value in values.items():
        if not name.endswith("_proj.weight"):
            stored[name] = value
            continue
        groups = value.float().view(len(value), -1, 32)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16)
        codes = (groups / scale).round().clamp(-8, 7)
        values[name] = (codes.to(torch.bfloat16) * scale).view_as(value)
        stored[f"{name}_packed"] = packed(codes.view_as(value))
        stored[f"{name}_scale"] = scale[..., 0]
        stored[f"{name}_shape"] = torch.tensor(value.shape)
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(stored, out / "model.safetensors")
    return values


def test_a_packed_base_and_a_plain_fine_tune(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="bfloat16",
    )
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    base, tuned = quantise(tmp_path / "base", tmp_path / "int4"), load_file(tmp_path / "tuned" / "model.safetensors")
    mergekit_lite.extrapolate(tmp_path / "int4", tmp_path / "tuned", tmp_path / "out", alpha=0.5)
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == tuned.keys()
    for name, value in out.items():
        exact = 1.5 * tuned[name].double() - 0.5 * base[name].double()
        torch.testing.assert_close(value.double(), exact, rtol=2**-8, atol=0)
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out")]).exit_code == 0

    # The other way round the config is the quantised model's, without what is gone.
    mergekit_lite.extrapolate(tmp_path / "tuned", tmp_path / "int4", tmp_path / "back", alpha=0)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items() if name in base)


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """transformers, which dequantises the same file itself, has the same weights."""
    from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_local_experts=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, num_experts_per_tok=1, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(1)
    tuned = AutoModelForCausalLM.from_config(config)
    tuned.save_pretrained(tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    experts = [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]
    for name in experts:
        number, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (number, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(115, 125, (number, outputs, inputs // 32), dtype=torch.uint8)
    published = json.loads((tmp_path / "tuned" / "config.json").read_text())
    published["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "mxfp4").mkdir()
    (tmp_path / "mxfp4" / "config.json").write_text(json.dumps(published))
    save_file(tensors, tmp_path / "mxfp4" / "model.safetensors", {"format": "pt"})

    mergekit_lite.extrapolate(tmp_path / "tuned", tmp_path / "mxfp4", tmp_path / "out", alpha=0)
    out, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert experts and not loading["missing_keys"] and not loading["unexpected_keys"]
    itself = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mxfp4", quantization_config=Mxfp4Config(dequantize=True), dtype="bfloat16"
    )
    expected = itself.state_dict()
    assert out.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in out.state_dict().items())
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out")]).exit_code == 0
