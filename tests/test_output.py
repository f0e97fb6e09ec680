"""What is written: folders that load as they are, files of each kind, and what travels beside the weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import mergekit_lite
from mergekit_lite.output.companions import companions_of
from tests.models import bytes_of, read_folder, same_bytes, state, tuned, write_folder

transformers = pytest.importorskip("transformers")


@pytest.fixture
def llamas(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama before and after, saved by transformers, with things beside it."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "sft")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.01
    model.save_pretrained(tmp_path / "dpo")
    dpo = tmp_path / "dpo"
    (dpo / "tokenizer.json").write_text("{}")
    (dpo / "chat_template.jinja").write_text("{{ messages }}")
    (dpo / "LICENSE").write_text("Apache")
    (dpo / "modeling_evil.py").write_text("raise SystemExit")
    (dpo / "onnx").mkdir()
    (dpo / "onnx" / "model.onnx").write_text("x")
    (dpo / "assets").mkdir()
    (dpo / "note.txt").write_text("mine")
    (dpo / "training.gguf").write_text("x")
    (dpo / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\ntags: [x]\n---\n# Old card\n")
    return tmp_path / "sft", dpo


def test_the_folder_loads_in_transformers_as_it_is(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    mergekit_lite.extrapolate(*llamas, tmp_path / "out", 0.5, out_dtype="float32", shard_size=3000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    sft, dpo = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in llamas)
    for (name, got), a, s in zip(model.named_parameters(), dpo.parameters(), sft.parameters(), strict=True):
        torch.testing.assert_close(got.double(), a + 0.5 * (a - s), rtol=1e-6, atol=1e-9, msg=name)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_what_travels_and_what_does_not(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    mergekit_lite.extrapolate(*llamas, out, 0.5)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
        "LICENSE", "README.md", "mergekit_lite_manifest.json",
    }  # fmt: skip
    left_out = {
        "modeling_evil.py": "code", "training.gguf": "other weights", "assets/": "a folder", "onnx/": "a folder",
        "note.txt": "no config, tokenizer, template or licence by its name",
    }  # fmt: skip
    assert companions_of(mergekit_lite.open_checkpoint(llamas[1]))[1] == left_out
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["mergekit-lite", "merge"] and "base_model" not in front  # paths mean nothing on the hub
    assert "- `dpo` (config, tokenizer)\n- `sft`\n" in card and str(tmp_path) not in card
    assert front["license"] == "apache-2.0"
    assert "alpha: 0.5" in card and "merge_method: expo" in card


def test_config_tells_the_written_dtype(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((llamas[1] / "config.json").read_text())
    config |= {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 16}}
    (llamas[1] / "config.json").write_text(json.dumps(config))
    mergekit_lite.extrapolate(*llamas, tmp_path / "out", 0.5, out_dtype="fp16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == written["text_config"]["dtype"] == "float16"
    assert written["text_config"]["hidden_size"] == 16


@pytest.mark.parametrize("sft_is_tied", [True, False])
def test_the_tie_flag_is_true_to_what_was_written(tmp_path: Path, sft_is_tied: bool) -> None:
    """An aligned model that lists its head but says it is tied: loading must not throw the written head away."""
    sft = state(0)
    sft["lm_head.weight"] = sft["model.embed_tokens.weight"].clone() if sft_is_tied else sft["lm_head.weight"]
    aligned = tuned(sft, 1)
    aligned["lm_head.weight"] = aligned["model.embed_tokens.weight"].clone()
    config = {"model_type": "llama", "tie_word_embeddings": True}
    write_folder(tmp_path / "sft", sft, config=config)
    write_folder(tmp_path / "dpo", aligned, config=config)
    mergekit_lite.extrapolate(tmp_path / "sft", tmp_path / "dpo", tmp_path / "out", 0.5)
    got = read_folder(tmp_path / "out")
    same = torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    assert same == sft_is_tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == sft_is_tied


def test_safetensors_metadata_and_index(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    mergekit_lite.extrapolate(*llamas, out, 0.5, shard_size=2000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = read_folder(out)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert same_bytes(opened.get_tensor(name), tensors[name])


@pytest.mark.parametrize("nest", [(), ("model",), ("state_dict", "module")])
@pytest.mark.parametrize("name", ["boosted.pt", "boosted.safetensors"])
def test_torch_files_in_and_files_out(tmp_path: Path, nest: tuple[str, ...], name: str) -> None:
    sft = state(0) | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "flag": torch.tensor([True, False])}
    aligned = {key: tensor.clone() if not tensor.is_floating_point() else tensor * 1.25 for key, tensor in sft.items()}
    for path, tensors in ((tmp_path / "sft.pt", sft), (tmp_path / "dpo.bin", aligned)):
        content: dict[str, object] = dict(tensors)
        for key in reversed(nest):
            content = {key: content}
        torch.save(content, path)
    mergekit_lite.extrapolate(tmp_path / "sft.pt", tmp_path / "dpo.bin", tmp_path / name, 1.0)
    if name.endswith(".pt"):
        got = torch.load(tmp_path / name, weights_only=True)
        for key in nest:
            got = got[key]
    else:
        with safe_open(tmp_path / name, "pt") as opened:
            got = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert set(got) == set(sft)
    for key, tensor in sft.items():
        expected = tensor if not tensor.is_floating_point() else torch.lerp(aligned[key], tensor, -1.0)
        assert same_bytes(got[key], expected), key
    manifest = json.loads((tmp_path / f"{name}.manifest.json").read_text())
    assert manifest["tensors"].keys() == sft.keys()
    assert not list(tmp_path.glob(".*partial*"))


def test_a_torch_file_has_the_same_bytes_under_every_name(tmp_path: Path) -> None:
    sft = state(0)
    torch.save(sft, tmp_path / "sft.pt")
    torch.save(tuned(sft, 1), tmp_path / "dpo.pt")
    names = ("a.pt", "a-much-longer-name.pt", "archive.bin")
    for name in names:
        mergekit_lite.extrapolate(tmp_path / "sft.pt", tmp_path / "dpo.pt", tmp_path / name, 1.0)
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1
    assert torch.load(tmp_path / names[0], weights_only=True).keys() == sft.keys()


def test_a_torch_file_that_finds_no_room_to_be_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(state(0), tmp_path / "sft.pt")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(mergekit_lite.RunError, match=r"nowhere.*set TMPDIR to another folder"):
        mergekit_lite.extrapolate(tmp_path / "sft.pt", tmp_path / "sft.pt", tmp_path / "out.pt", 1.0)


def test_a_training_checkpoint_gives_its_model_and_the_plan_names_the_rest(tmp_path: Path) -> None:
    sft = state(0)
    aligned = {name: tensor * 1.25 for name, tensor in sft.items()}
    for name, tensors in (("sft.pt", sft), ("dpo.pt", aligned)):
        beside = {"optimizer": {"state": {}}, "iter_num": 5, "best_val_loss": torch.tensor(3.1)}
        torch.save({"model": tensors} | beside, tmp_path / name)
    plan = mergekit_lite.plan_extrapolation(tmp_path / "sft.pt", tmp_path / "dpo.pt", tmp_path / "out.pt", 1.0)
    assert {name for _, name, _ in plan.left_out} == {"optimizer", "iter_num", "best_val_loss"}
    mergekit_lite.extrapolate(tmp_path / "sft.pt", tmp_path / "dpo.pt", tmp_path / "out.pt", 1.0)
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert got.keys() == {"model"} and got["model"].keys() == sft.keys()
    assert all(same_bytes(got["model"][name], torch.lerp(aligned[name], sft[name], -1.0)) for name in sft)


def test_the_manifest_identifies_inputs_and_outputs(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    """Digests as documented, recomputed here from the files' bytes."""
    import xxhash

    mergekit_lite.extrapolate(*llamas, tmp_path / "out", 0.5)
    manifest = json.loads((tmp_path / "out" / "mergekit_lite_manifest.json").read_text())
    models = [read_folder(path) for path in (tmp_path / "out", llamas[1], llamas[0])]
    for name, digests in manifest["tensors"].items():
        told = [digests["output"], *digests["inputs"]]
        again = [
            xxhash.xxh3_128_hexdigest(xxhash.xxh3_128_hexdigest(bytes_of(model[name])).encode()) for model in models
        ]
        assert told == again, name
    assert manifest["recipe"]["parameters"]["alpha"] == 0.5
    assert [source["reference"] for source in manifest["inputs"]] == [str(llamas[1]), str(llamas[0])]
    assert manifest["effect"]["effective"] == pytest.approx(0.5, abs=0.1)
    assert str(tmp_path) not in json.dumps({key: manifest[key] for key in manifest.keys() - {"inputs", "recipe"}})


def test_nan_is_reported_by_name_and_published_only_where_asked(tmp_path: Path) -> None:
    sft = state(0)
    aligned = tuned(sft, 1)
    sft["model.norm.weight"][3] = torch.nan
    aligned["lm_head.weight"][0, 0] = torch.inf
    write_folder(tmp_path / "sft", sft)
    write_folder(tmp_path / "dpo", aligned)
    out = tmp_path / "out"
    with pytest.raises(mergekit_lite.MergekitLiteError) as raised:
        mergekit_lite.extrapolate(tmp_path / "sft", tmp_path / "dpo", out, 0.5)
    assert f"model.norm.weight in {tmp_path / 'sft'}" in str(raised.value)
    assert f"lm_head.weight in {tmp_path / 'dpo'}" in str(raised.value)
    assert not out.exists()
    mergekit_lite.extrapolate(tmp_path / "sft", tmp_path / "dpo", out, 0.5, resume=True, allow_nonfinite=True)
    assert torch.isnan(read_folder(out)["model.norm.weight"][3])


def test_a_result_that_the_dtype_cannot_hold_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path / "sft", {"w": torch.tensor([1.0, 1.0])})
    write_folder(tmp_path / "dpo", {"w": torch.tensor([60000.0, 1.0])})
    with pytest.raises(mergekit_lite.MergekitLiteError, match=r"w in the output \(float16 can't hold the result\)"):
        mergekit_lite.extrapolate(tmp_path / "sft", tmp_path / "dpo", tmp_path / "out", 1.0, out_dtype="float16")
