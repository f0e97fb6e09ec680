"""Merging and extrapolating bases with adapters: as with the checkpoints they stand for, in any cut, and resumable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite.checkpoint.checkpoint import Added
from mergekit_lite.commands import main
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.output.card import model_card
from tests.adapters import PREFIX, folded, lora, write_adapter
from tests.models import State, bytes_of, read_folder, same_bytes, state, tuned, write_folder

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base (one tensor of it larger than a chunk), a tuned model, and an adapter."""
    monkeypatch.chdir(tmp_path)
    base = state(0, hidden=32) | {f"{DOWN}.weight": torch.randn(1501, 1100).mul(0.02).bfloat16()}
    write_folder(tmp_path / "base", base, shards=2, config=CONFIG)
    (tmp_path / "base" / "tokenizer.json").write_text('"base"')
    write_folder(tmp_path / "tuned", tuned(base, 1), config=CONFIG)
    write_adapter(tmp_path / "adapter", lora(Q, 32, 32) | lora(DOWN, 1501, 1100, seed=1))
    (tmp_path / "adapter" / "tokenizer.json").write_text('"adapter"')
    return tmp_path


def merged(recipe: dict[str, object], output: str, **how: object) -> State:
    Path(f"{output}.yml").write_text(yaml.safe_dump(recipe))
    mergekit_lite.merge(f"{output}.yml", output, **how)
    return read_folder(Path(output))


def adapted(place: Path, dtype: torch.dtype = torch.float32) -> State:
    """The base with the adapter folded in, in memory."""
    base = read_folder(place / "base")
    wide = folded(base, read_folder(place / "adapter"))
    return {name: wide[name].to(dtype) if name[: -len(".weight")] in (Q, DOWN) else base[name] for name in base}


def nearly(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, but for one element in a thousand that lies a hair from a border of rounding."""
    differ = a != b
    return int(differ.sum()) <= len(a.flatten()) // 1000 and torch.allclose(
        a.double(), b.double(), rtol=2**-7, atol=1e-8
    )


def test_passthrough_folds_and_rounds_once(place: Path) -> None:
    got = merged({"merge_method": "passthrough", "models": [{"model": "./base+./adapter"}]}, "out")
    for name, expected in adapted(place, torch.bfloat16).items():
        assert got[name].dtype == torch.bfloat16 and nearly(got[name], expected), name
    assert not same_bytes(got[f"{Q}.weight"], read_folder(place / "base")[f"{Q}.weight"])
    assert (place / "out" / "tokenizer.json").read_text() == '"base"'
    assert not (place / "out" / "adapter_config.json").exists()
    assert sorted(path.name for path in (place / "out").glob("*.safetensors")) == sorted(
        path.name for path in (place / "base").glob("*.safetensors")
    )


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_a_merge_with_an_adapter_is_one_with_what_it_stands_for(method: str, place: Path) -> None:
    """The same bytes as with a float32 checkpoint of the fold, whatever threads and blocks."""
    recipe = {
        "merge_method": method,
        "base_model": "./base",
        "models": [{"model": "./base+./adapter"}, {"model": "./tuned"}][: 1 if method == "slerp" else 2],
        "parameters": {"t": 0.4} if method == "slerp" else {"weight": 0.5},
        "dtype": "bfloat16",
    }
    one = merged(recipe, "one", threads=1)
    five = merged(recipe, "five", threads=5, block=1 << 16)
    merged({"merge_method": "passthrough", "models": [{"model": "./base+./adapter"}], "dtype": "float32"}, "whole")
    recipe["models"][0] = {"model": "./whole"}  # type: ignore[index]
    whole = merged(recipe, "other")
    for name in one:
        assert same_bytes(one[name], five[name]), name
        assert same_bytes(one[name], whole[name]), name


def test_extrapolate_from_a_base_to_its_adapter(place: Path) -> None:
    base, wide = read_folder(place / "base"), folded(read_folder(place / "base"), read_folder(place / "adapter"))
    mergekit_lite.extrapolate("./base", "./base+./adapter", "out-{alpha}", [0.5, -1, 0])
    got = read_folder(place / "out-0.5")
    for name, tensor in base.items():
        assert nearly(got[name], (wide[name] + 0.5 * (wide[name] - tensor.double())).bfloat16()), name
        assert same_bytes(read_folder(place / "out--1")[name], tensor), name
    passed = merged({"merge_method": "passthrough", "models": [{"model": "./base+./adapter"}]}, "passed")
    assert all(same_bytes(tensor, passed[name]) for name, tensor in read_folder(place / "out-0").items())


def test_plan_and_manifest_name_both(place: Path) -> None:
    told = CliRunner().invoke(main, ["extrapolate", "base", "base+adapter", "-a", "1", "-o", "out", "--dry-run"])
    assert told.exit_code == 0 and "base+adapter" in told.output
    mergekit_lite.extrapolate("base", "base+adapter", "out", 1)
    manifest = json.loads((place / "out" / "mergekit_lite_manifest.json").read_text())
    tuned_model, plain = manifest["inputs"]
    assert tuned_model["reference"] == "base+adapter" and "added" not in plain
    assert tuned_model["base"] == "base"
    assert tuned_model["added"] == [{"reference": "adapter", "revision": None, "scale": 1.0, "rebase": False}]
    assert [file["name"] for file in tuned_model["files"]][-1] == "adapter_model.safetensors"


def test_the_card_links_the_base(place: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": "./base+./adapter"}]}
    (place / "r.yml").write_text(yaml.safe_dump(recipe))
    plan = mergekit_lite.plan_merge("r.yml", "out")
    [source] = plan.inputs
    [(adapter, addition)] = source.added
    fetched = replace(
        source,
        reference="org/base@main+org/lora@v1",
        revision="a" * 40,
        added=(Added(replace(adapter, reference="org/lora@v1", revision="b" * 40), addition),),
    )
    card = model_card(replace(plan, inputs=(fetched,)), 0, {"merged": 1, "copied": 0, "effective": None})
    assert "base_model:\n- org/base\n" in card and "](https://huggingface.co/org/base)" in card


def test_another_scale_or_adapter_is_another_plan(place: Path) -> None:
    def digest() -> str:
        return mergekit_lite.plan_extrapolation("base", "base+adapter", "out", 1).digest(0)

    first = digest()
    assert digest() == first
    write_adapter(place / "adapter", read_folder(place / "adapter"), lora_alpha=9)
    second = digest()
    write_adapter(place / "adapter", lora(Q, 32, 32))
    assert len({first, second, digest()}) == 3


def test_an_adapter_that_changed_is_not_resumed_with(place: Path) -> None:
    stop = RuntimeError("stopped")

    def fail(done: int, total: int) -> None:
        raise stop

    with pytest.raises(RuntimeError, match="stopped"):
        mergekit_lite.extrapolate("base", "base+adapter", "out", 1, threads=1, progress=fail)
    write_adapter(place / "adapter", read_folder(place / "adapter"), file="adapter_model.safetensors")
    with pytest.raises(MergekitLiteError, match="changed"):
        mergekit_lite.extrapolate("base", "base+adapter", "out", 1, threads=1, resume=True)


def test_a_run_that_stopped_goes_on_to_the_same_bytes(place: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise RuntimeError("stopped")

    mergekit_lite.extrapolate("base", "base+adapter", "whole", 1)
    with pytest.raises(RuntimeError, match="stopped"):
        mergekit_lite.extrapolate("base", "base+adapter", "out", 1, threads=1, progress=fail)
    mergekit_lite.extrapolate("base", "base+adapter", "out", 1, resume=True)
    resumed, whole = read_folder(place / "out"), read_folder(place / "whole")
    assert resumed.keys() == whole.keys() and all(bytes_of(resumed[name]) == bytes_of(whole[name]) for name in whole)


def test_an_output_in_the_adapter_is_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="Inputs are never touched"):
        mergekit_lite.extrapolate("base", "base+adapter", "adapter/out", 1)


def test_nan_in_an_adapter_stops_the_run(place: Path) -> None:
    tensors = read_folder(place / "adapter")
    tensors[f"{PREFIX}{Q}.lora_A.weight"][2, 3] = torch.nan
    write_adapter(place / "adapter", tensors)
    with pytest.raises(MergekitLiteError, match=r"NaN or infinity[^$]*q_proj.weight in base\+adapter"):
        mergekit_lite.extrapolate("base", "base+adapter", "out", 1)


def test_a_head_of_its_own_unties_the_output(place: Path) -> None:
    base = state(0, hidden=32)
    del base["lm_head.weight"]
    write_folder(place / "tied", base, config=CONFIG | {"tie_word_embeddings": True})
    write_adapter(place / "head", lora("lm_head", 16, 32))
    mergekit_lite.extrapolate("tied", "tied+head", "out", 0.5)
    got = read_folder(place / "out")
    assert json.loads((place / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    wide = folded(base | {"lm_head.weight": base["model.embed_tokens.weight"]}, read_folder(place / "head"))
    before = base["model.embed_tokens.weight"].double()
    assert nearly(got["lm_head.weight"], (1.5 * wide["lm_head.weight"] - 0.5 * before).bfloat16())


def test_a_quantised_base_leaves_no_quantisation_behind(place: Path) -> None:
    weights = state(0, hidden=32)
    scale = torch.full((32, 1), 0.01)
    weights[f"{Q}.weight"] = torch.randn(32, 32).to(torch.float8_e4m3fn)
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    write_folder(place / "fp8", weights | {f"{Q}.weight_scale": scale}, config=config)
    write_adapter(place / "q", lora(Q, 32, 32))
    got = merged({"merge_method": "passthrough", "models": [{"model": "fp8+q"}]}, "out")
    assert got[f"{Q}.weight"].dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((place / "out" / "config.json").read_text())


def test_a_resized_vocabulary_has_the_adapters_tokenizer(place: Path) -> None:
    def write(folder: Path, text: str) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).write_text(f'{{"{text}": 1}}')

    config = CONFIG | {"vocab_size": 16, "text_config": {"vocab_size": 16}, "vision_config": {"vocab_size": 8}}
    write_folder(place / "whole", state(0, hidden=32), config=config)
    write(place / "whole", "base")
    (place / "whole" / "generation_config.json").write_text("{}")
    names = ("lm_head", "model.embed_tokens")
    for rows in (16, 20):
        grown = {f"{PREFIX}{name}.weight": torch.full((rows, 32), 0.5) for name in names}
        write(write_adapter(place / f"rows-{rows}", grown), "adapter")
    write(write_adapter(place / "plain", lora(Q, 32, 32)), "adapter")
    for name, rows, whose in (("rows-20", 20, "adapter"), ("rows-16", 16, "adapter"), ("plain", 16, "base")):
        merged({"merge_method": "passthrough", "models": [{"model": f"./whole+./{name}"}]}, f"out-{name}")
        out = place / f"out-{name}"
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (out / file).read_text() == f'{{"{whose}": 1}}'
        written = json.loads((out / "config.json").read_text())
        sizes = [written["vocab_size"], written["text_config"]["vocab_size"], written["vision_config"]["vocab_size"]]
        assert sizes == [rows, rows, 8]
        assert (out / "generation_config.json").exists()
        told = CliRunner().invoke(main, ["verify", str(out)])
        assert told.exit_code == 0, told.output


def test_a_resized_vocabulary_beside_its_base(place: Path) -> None:
    grown = {f"{PREFIX}{name}.weight": torch.full((20, 32), 0.5) for name in ("lm_head", "model.embed_tokens")}
    write_adapter(place / "grown", grown)
    with pytest.raises(MergekitLiteError, match="--new-rows copy"):
        mergekit_lite.extrapolate("base", "base+grown", "out", 0.5)
    mergekit_lite.extrapolate("base", "base+grown", "out", 0.5, new_rows="copy")
    assert read_folder(place / "out")["lm_head.weight"].shape == (20, 32)
