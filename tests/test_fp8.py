"""FP8 outputs: codes and scales of blocks, held to the exact results, to our own reader and to transformers'."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

import mergekit_lite
from mergekit_lite import block_fp8
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.commands import main
from mergekit_lite.errors import PlanError, UsageError
from tests.checkpoint.reading import read_all
from tests.models import State, same_bytes, tree_bytes, tuned, write_folder

SIZES = {
    "vocab_size": 40, "hidden_size": 384, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 128, "max_position_embeddings": 64,
}  # fmt: skip
ALPHA = 0.5


def test_codes_are_nearest_and_scales_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(256, 384, generator=generator) * torch.rand(256, 384, generator=generator).pow(8)
    values[:128, :128] = 0
    values[128:, :128] *= 1e-44  # subnormal
    codes, scales = block_fp8.quantised(values)
    assert (codes.dtype, scales.shape, scales[0, 0]) == (torch.float8_e4m3fn, (2, 3), 1)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    for row, column in ((0, 1), (1, 1), (1, 2)):
        place = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
        scale = scales[row, column].double()
        assert values[place].abs().max().double() / scale == pytest.approx(448)
        nearest = (values[place].double().flatten()[:, None] - grid * scale).abs().amin(1)
        error = (values[place].double() - codes[place].double() * scale).abs().flatten()
        assert (error <= nearest + 1e-6 * scale * 448).all()
    assert torch.equal(block_fp8.dequantised(codes, scales)[:128, :128], torch.zeros(128, 128))
    assert (block_fp8.dequantised(codes, scales)[128:, :128] - values[128:, :128]).abs().max() < 2.0**-126 / 16
    values[3, 200] = torch.nan
    codes, scales = block_fp8.quantised(values)
    assert scales.isnan().tolist() == [[False, True, False], [False, False, False]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of models that transformers saved, and the FP8 model made of them."""
    folder = tmp_path_factory.mktemp("fp8")
    config = transformers.Qwen3Config(**SIZES)
    for seed, name in enumerate(("sft", "dpo")):
        model = transformers.AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        model.bfloat16().save_pretrained(folder / name, max_shard_size="2MB")
    mergekit_lite.extrapolate(folder / "sft", folder / "dpo", folder / "out", ALPHA, out_dtype="fp8")
    return folder


def state_of(folder: Path) -> State:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_values_are_within_half_a_step(place: Path) -> None:
    sft, dpo, written = (state_of(place / name) for name in ("sft", "dpo", "out"))
    read = read_all(open_checkpoint(place / "out"))
    quantised = [name for name in written if name + "_scale_inv" in written]
    assert len(quantised) == 7 * SIZES["num_hidden_layers"]
    assert written.keys() == {*dpo, *(name + "_scale_inv" for name in quantised)}
    changes = sizes = 0.0
    for name in dpo:
        exact = (dpo[name].double() + ALPHA * (dpo[name].double() - sft[name].double())).float()
        if name not in quantised:
            assert same_bytes(written[name], exact.bfloat16()), name
            continue
        scale = written[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        size = (exact / scale).abs()
        step = 2.0 ** (torch.floor(torch.log2(size.clamp(min=2.0**-6))) - 3)
        assert ((read[name] - exact).abs() / scale <= step / 2 + 3e-7 * size).all(), name
        changes += float((read[name].double() - exact.double()).square().sum())
        sizes += float(exact.double().square().sum())
    effect = json.loads((place / "out" / "mergekit_lite_manifest.json").read_text())["effect"]
    assert effect["fp8_error"] == pytest.approx((changes / sizes) ** 0.5)
    moved = delta = 0.0
    for name in dpo:
        change = (dpo[name].double() - sft[name].double()).flatten()
        moved += float(torch.dot((read[name].double() - dpo[name].double()).flatten(), change))
        delta += float(torch.dot(change, change))
    assert effect["effective"] == pytest.approx(moved / delta)


def test_transformers_loads_the_same_values(place: Path) -> None:
    config = json.loads((place / "out" / "config.json").read_text())
    kept = config["quantization_config"].pop("modules_to_not_convert")
    assert sorted(kept) == ["lm_head", "model.embed_tokens"]
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place / "out", quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    loaded = model.state_dict()
    for name, tensor in read_all(open_checkpoint(place / "out")).items():
        assert torch.equal(loaded[name], tensor.bfloat16()), name


@pytest.mark.parametrize(("threads", "block", "processes"), [(1, 1 << 15, False), (3, 1 << 20, True)])
def test_bytes_depend_on_nothing_else(place: Path, tmp_path: Path, threads: int, block: int, processes: bool) -> None:
    mergekit_lite.extrapolate(
        place / "sft", place / "dpo", tmp_path / "out", ALPHA, out_dtype="fp8", threads=threads, block=block,
        processes=processes,
    )  # fmt: skip
    assert tree_bytes(tmp_path / "out") == tree_bytes(place / "out")


def test_verify_makes_it_again(place: Path, tmp_path: Path) -> None:
    verdict = mergekit_lite.verify(place / "out", samples="all")
    assert verdict.sound and len(verdict.recomputed) == verdict.tensors
    alone = mergekit_lite.verify(place / "out", samples=1, seed=3)
    assert alone.sound and len(alone.recomputed) in (1, 2)
    copy = tmp_path / "out"
    copy.mkdir()
    for file in (place / "out").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    spec = open_checkpoint(place / "out").tensors["model.layers.1.mlp.up_proj.weight"].encoding.scale
    weights[spec.offset] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    [finding] = mergekit_lite.verify(copy, samples=0).findings
    assert "up_proj.weight_scale_inv" in str(finding)


class Stopped(Exception):
    """What the test stops a run with."""


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
def test_a_stopped_run_ends_with_the_same_bytes(place: Path, tmp_path: Path, share: float) -> None:
    def stop(done: int, total: int) -> None:
        if done > share * total:
            raise Stopped

    pair = place / "sft", place / "dpo", tmp_path / "out", ALPHA
    with pytest.raises(Stopped):
        mergekit_lite.extrapolate(*pair, out_dtype="fp8", threads=1, progress=stop)
    [written] = tmp_path.glob(".out.partial/**/model.safetensors")
    offset = written.stat().st_size // 100  # among the scales, which lie in front
    with written.open("r+b") as file:  # and what a power cut may have left of them
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    mergekit_lite.extrapolate(*pair, out_dtype="fp8", resume=True)
    assert tree_bytes(tmp_path / "out") == tree_bytes(place / "out")


def recipe(place: Path, **more: object) -> dict[str, object]:
    models = [{"model": str(place / name), "parameters": {"weight": 0.5}} for name in ("sft", "dpo")]
    return {"merge_method": "linear", "models": models, "out_dtype": "fp8", **more}


def test_a_recipe_and_the_command(place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe(place)))
    arguments = ["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "out")]
    planned = CliRunner().invoke(main, [*arguments, "--dry-run"], catch_exceptions=False)
    assert planned.exit_code == 0 and "scales of FP8 blocks" in planned.output
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "FP8 weights differ from the exact results by 2." in result.output
    sft, dpo = state_of(place / "sft"), state_of(place / "dpo")
    name = "model.layers.0.self_attn.k_proj.weight"
    codes, scales = block_fp8.quantised(sft[name].float() / 2 + dpo[name].float() / 2)
    written = state_of(tmp_path / "out")
    assert same_bytes(written[name], codes) and same_bytes(written[name + "_scale_inv"], scales)
    assert mergekit_lite.verify(tmp_path / "out", samples="all").sound


def test_what_is_not_quantised(tmp_path: Path) -> None:
    """Layers with a size that is no multiple of 128 and their siblings, routers, towers, norms; excluded ones are."""
    layer = "model.layers.0."
    shapes: dict[str, Sequence[int]] = {
        layer + "self_attn.q_proj.weight": (128, 128), layer + "self_attn.kv_a_proj_with_mqa.weight": (72, 128),
        layer + "mlp.gate.weight": (128, 128), layer + "mlp.experts.0.gate_proj.weight": (256, 128),
        layer + "mlp.shared_experts.up_proj.weight": (128, 256), layer + "input_layernorm.weight": (128,),
        "visual.layers.0.mlp.up_proj.weight": (128, 128), "model.embed_tokens.weight": (128, 128),
        layer + "mlp.experts.gate_up_proj": (2, 128, 128), layer + "block_sparse_moe.experts.3.w2.weight": (128, 128),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    sft: State = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    paths = write_folder(tmp_path / "a", sft), write_folder(tmp_path / "b", tuned(sft, 1))
    mergekit_lite.extrapolate(*paths, tmp_path / "out", 1.0, out_dtype="fp8", exclude=["w2"])
    written = state_of(tmp_path / "out")
    quantised = {name for name in written if name + "_scale_inv" in written}
    assert quantised == {
        layer + "mlp.experts.0.gate_proj.weight", layer + "mlp.shared_experts.up_proj.weight",
        layer + "block_sparse_moe.experts.3.w2.weight",
    }  # fmt: skip
    copied = layer + "block_sparse_moe.experts.3.w2.weight"
    assert same_bytes(written[copied], block_fp8.quantised(state_of(paths[1])[copied].float())[0])
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    matrices = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1}
    assert set(kept) == matrices - {name.removesuffix(".weight") for name in quantised} | {"lm_head"}
    assert mergekit_lite.verify(tmp_path / "out", samples="all").sound


def test_refusals(place: Path, tmp_path: Path) -> None:
    pair = place / "sft", place / "dpo"
    with pytest.raises(PlanError, match="needs a folder with a config"):
        mergekit_lite.plan_extrapolation(*pair, tmp_path / "x.safetensors", 0.5, out_dtype="fp8")
    with pytest.raises(UsageError, match="fp8 is rounded to nearest"):
        mergekit_lite.plan_extrapolation(*pair, tmp_path / "x", 0.5, out_dtype="fp8", rounding="stochastic")
    with pytest.raises(UsageError, match="Did you mean 'fp8'"):
        mergekit_lite.plan_extrapolation(*pair, tmp_path / "x", 0.5, out_dtype="fp9")
    with pytest.raises(UsageError, match="'dtype' expects one of float64"):
        (tmp_path / "recipe.yml").write_text(json.dumps(recipe(place, dtype="fp8")))
        mergekit_lite.plan_merge(tmp_path / "recipe.yml", tmp_path / "x")
    small = {"model.layers.0.mlp.up_proj.weight": torch.ones(8, 8).bfloat16()}
    paths = write_folder(tmp_path / "a", small), write_folder(tmp_path / "b", small)
    with pytest.raises(PlanError, match="multiples of 128"):
        mergekit_lite.plan_extrapolation(*paths, tmp_path / "x", 0.5, out_dtype="fp8")


def test_a_nan_is_refused(tmp_path: Path) -> None:
    good = {"model.layers.0.mlp.up_proj.weight": torch.ones(128, 256).bfloat16()}
    bad = {name: tensor.clone() for name, tensor in good.items()}
    bad["model.layers.0.mlp.up_proj.weight"][random.randrange(128), 200] = torch.nan
    paths = write_folder(tmp_path / "a", good), write_folder(tmp_path / "b", bad)
    with pytest.raises(mergekit_lite.errors.NonFiniteError, match=f"up_proj.weight in {paths[1]}"):
        mergekit_lite.extrapolate(*paths, tmp_path / "out", 0.5, out_dtype="fp8")
