"""Folders of several models: each part treated by one plan, and written where and as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_lite
from mergekit_lite.errors import CheckpointError, PlanError
from mergekit_lite.output.companions import companions
from tests.adapters import lora, write_adapter
from tests.checkpoint.pipelines import (
    DENSE,
    INDEX,
    MODULES,
    SMALL,
    State,
    stored,
    write_pipeline,
    write_sentences,
    write_small,
)
from tests.models import state, tree_bytes, tuned, write_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def extrapolated(sft: dict[str, State], aligned: dict[str, State], alpha: float) -> dict[str, State]:
    """Return aligned + alpha·(aligned − sft), in float64, rounded once."""
    return {
        folder: {
            name: (tensor.double() + alpha * (tensor.double() - sft[folder][name].double())).to(tensor.dtype)
            for name, tensor in own.items()
        }
        for folder, own in aligned.items()
    }


def assert_same(got: dict[str, State], wanted: dict[str, State]) -> None:
    assert got.keys() == wanted.keys()
    for folder, own in wanted.items():
        assert got[folder].keys() == own.keys()
        for name, tensor in own.items():
            assert got[folder][name].dtype == tensor.dtype and torch.equal(got[folder][name], tensor), (folder, name)


def files_of(folder: str) -> set[str]:
    own = {"README.md", "mergekit_lite_manifest.json", "mergekit_config.yml"}
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()} - own


# --- pipelines of diffusers


def test_a_pipeline_comes_out_as_it_went_in(place: Path) -> None:
    sft, aligned = write_pipeline(place / "sft", 0), write_pipeline(place / "aligned", 1)
    mergekit_lite.extrapolate("sft", "aligned", "out", 0.5)
    assert files_of("out") == files_of("aligned")
    assert_same(stored(place / "out"), extrapolated(sft, aligned, 0.5))
    for name, content in SMALL.items():
        assert json.loads((place / "out" / name).read_text()) == content
    assert mergekit_lite.verify("out", samples="all").sound
    assert "library_name: diffusers" in (place / "out" / "README.md").read_text()


def test_filters_name_a_part_by_its_path(place: Path) -> None:
    sft, aligned = write_pipeline(place / "sft", 0), write_pipeline(place / "aligned", 1)
    mergekit_lite.extrapolate("sft", "aligned", "out", 0.5, include=["^unet/"], alpha_for={"^unet/conv_in": 2.0})
    wanted = extrapolated(sft, aligned, 0.5)["unet"]
    wanted |= {
        name: tensor for name, tensor in extrapolated(sft, aligned, 2.0)["unet"].items() if name.startswith("conv_in")
    }
    assert_same(stored(place / "out"), aligned | {"unet": wanted})


def test_a_recipe_of_pipelines(place: Path) -> None:
    parts = [write_pipeline(place / name, seed) for seed, name in enumerate("abc")]
    (place / "r.yml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}, {model: c}]\n"
        "parameters: {weight: [{filter: unet/, value: 1}, {value: 1}], normalize: true}\n"
    )
    mergekit_lite.merge("r.yml", "out")
    for folder, own in stored(place / "out").items():
        for name, tensor in own.items():
            mean = sum(part[folder][name].double() for part in parts) / 3
            assert torch.allclose(tensor.double(), mean, atol=1e-7)
    assert mergekit_lite.verify("out", samples="all").sound


def test_out_dtype_and_shards_of_each_part(place: Path) -> None:
    sft, aligned = write_pipeline(place / "sft", 0), write_pipeline(place / "aligned", 1)
    mergekit_lite.extrapolate("sft", "aligned", "out", 0.5, out_dtype="bfloat16", shard_size=160)
    wanted = extrapolated(sft, aligned, 0.5)
    bf16 = {folder: {name: tensor.bfloat16() for name, tensor in own.items()} for folder, own in wanted.items()}
    assert_same(stored(place / "out"), bf16)
    shards = [f"unet/diffusion_pytorch_model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    index = json.loads((place / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert {f"unet/{name}" for name in index["weight_map"].values()} == set(shards) <= files_of("out")
    assert index["weight_map"].keys() == aligned["unet"].keys()
    assert json.loads((place / "out" / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((place / "out" / "unet" / "config.json").read_text()) == SMALL["unet/config.json"]
    assert mergekit_lite.verify("out", samples="all").sound
    mergekit_lite.extrapolate("sft", "out", "again", 0.0)  # shards are read, and written alike
    assert_same(stored(place / "again"), bf16)
    assert set(shards) <= files_of("again")


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the plain ones"])
def test_variants_are_read_where_there_is_nothing_else(place: Path, beside: bool) -> None:
    sft = write_pipeline(place / "sft", 0)
    half = write_pipeline(place / "aligned", 2, torch.float16, ".fp16")
    aligned = write_pipeline(place / "aligned", 1) if beside else half
    plan = mergekit_lite.plan_extrapolation("sft", "aligned", "out", 0.5)
    mergekit_lite.run(plan)
    assert_same(stored(place / "out"), extrapolated(sft, aligned, 0.5))
    assert files_of("out") == files_of("sft")  # every loader finds names without a variant
    assert any("variant=" in note for note in plan.notes) == (not beside)


def test_what_lies_beside_the_parts_is_named(place: Path) -> None:
    write_pipeline(place / "sft", 0)
    write_pipeline(place / "aligned", 1)
    save_file({"x": torch.ones(2)}, place / "aligned" / "v1-5-pruned.safetensors")
    (place / "aligned" / "onnx").mkdir()
    (place / "aligned" / "unet" / "model.onnx").write_bytes(b"no")
    plan = mergekit_lite.plan_extrapolation("sft", "aligned", "out", 0.5)
    mergekit_lite.run(plan)
    left = companions(plan)[1]
    assert left.keys() == {"v1-5-pruned.safetensors", "onnx/", "unet/model.onnx"}
    assert left["v1-5-pruned.safetensors"] == "other weights"
    assert files_of("out") == files_of("sft")


def test_one_component_alone_keeps_the_names_of_diffusers(place: Path) -> None:
    parts = [write_pipeline(place / name, seed)["unet"] for seed, name in enumerate(("sft", "aligned"))]
    mergekit_lite.extrapolate("sft/unet", "aligned/unet", "out", 0.5, out_dtype="bfloat16")
    assert files_of("out") == {"config.json", "diffusion_pytorch_model.safetensors"}
    wanted = extrapolated({"": parts[0]}, {"": parts[1]}, 0.5)[""]
    assert_same(stored(place / "out"), {"": {name: tensor.bfloat16() for name, tensor in wanted.items()}})
    assert json.loads((place / "out" / "config.json").read_text()) == SMALL["unet/config.json"]
    assert mergekit_lite.verify("out", samples="all").sound


def test_a_pipeline_is_resumed_part_by_part(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(place / "sft", 0)
    write_pipeline(place / "aligned", 1)
    mergekit_lite.extrapolate("sft", "aligned", "whole", 0.5)
    from mergekit_lite.output.workspace import OutputWorkspace

    def fail(self: OutputWorkspace, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OutputWorkspace, "publish", fail)
        with pytest.raises(KeyboardInterrupt):
            mergekit_lite.extrapolate("sft", "aligned", "out", 0.5)
    assert not (place / "out").exists() and (place / ".out.partial" / "result" / "unet").is_dir()
    mergekit_lite.extrapolate("sft", "aligned", "out", 0.5, resume=True)
    whole, out = tree_bytes(place / "whole"), tree_bytes(place / "out")
    assert whole.keys() == out.keys()
    same = [name for name in whole if name not in ("README.md",)]
    assert [whole[name] for name in same] == [out[name] for name in same]
    assert mergekit_lite.extrapolate("sft", "aligned", "out", 0.5, resume=True).outputs == (Path("out"),)


def test_vectors_and_comparison_of_pipelines(place: Path) -> None:
    write_pipeline(place / "sft", 0)
    aligned = write_pipeline(place / "aligned", 1)
    mergekit_lite.extract_vector("sft", "aligned", "v.safetensors")
    mergekit_lite.apply_vectors("sft", ["v.safetensors"], "out")
    assert_same(stored(place / "out"), aligned)
    compared = mergekit_lite.compare("sft", ["aligned"])
    assert {entry.tensor.name for entry in compared.tensors} == {
        f"{folder}/{name}" for folder, own in aligned.items() for name in own
    }
    inspected = mergekit_lite.inspect("aligned", stats=True)
    assert not inspected.doubts and inspected.stacks == {"unet/down_blocks": 1}
    with pytest.raises(
        PlanError, match=r"aligned: is a folder of several models.*name one of them: aligned/text_encoder"
    ):
        mergekit_lite.extract_vector("sft", "aligned", "ad", format="lora", rank=1)


def test_doubts_name_the_part(place: Path) -> None:
    write_small(place / "a", {"model_index.json": {"text_encoder": ["transformers", "T5EncoderModel"]}})
    write_folder(place / "a" / "text_encoder", state(0), config={"model_type": "t5", "vocab_size": 7})
    [doubt] = mergekit_lite.inspect("a").doubts
    assert doubt == "text_encoder/config.json: vocab_size is 7, but model.embed_tokens.weight has 16 rows"


# --- what is refused


def test_a_single_file_can_not_hold_a_pipeline(place: Path) -> None:
    write_pipeline(place / "sft", 0)
    write_pipeline(place / "aligned", 1)
    with pytest.raises(PlanError, match=r"several models \(text_encoder/, unet/, vae/\), so the output is a folder"):
        mergekit_lite.extrapolate("sft", "aligned", "out.safetensors", 0.5)


def test_a_component_without_its_weights(place: Path) -> None:
    write_pipeline(place / "a", 0)
    (place / "a" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lack their weights; download them again:\n.*vae/ \(AutoencoderKL\)"):
        mergekit_lite.open_checkpoint("a")
    shutil.rmtree(place / "a" / "vae")
    with pytest.raises(CheckpointError, match=r"vae/ \(AutoencoderKL\)"):
        mergekit_lite.open_checkpoint("a")


def test_configs_of_parts_that_contradict_each_other(place: Path) -> None:
    write_pipeline(place / "a", 0)
    write_pipeline(place / "b", 1)
    write_small(place / "b", {"vae/config.json": {"_class_name": "AsymmetricAutoencoderKL"}})
    with pytest.raises(PlanError, match=r'vae/_class_name: "AsymmetricAutoencoderKL" in b, "AutoencoderKL" in a'):
        mergekit_lite.extrapolate("a", "b", "out", 0.5)


@pytest.mark.parametrize("folder", ["../secret", "/etc", "a/../b", "a/b/c", ".hidden", "a\\b", "x\ny", "ünet", ""])
def test_a_folder_that_leads_elsewhere(place: Path, folder: str) -> None:
    write_pipeline(place / "secret", 0)
    write_pipeline(place / "a", 0)
    write_small(place / "a", {"model_index.json": INDEX | {folder: ["diffusers", "UNet2DConditionModel"]}})
    with pytest.raises(CheckpointError):
        mergekit_lite.open_checkpoint("a")
    write_sentences(place / "s", 0)
    write_small(place / "s", {"modules.json": [*MODULES, {"path": folder or "./", "type": "Dense"}]})
    with pytest.raises(CheckpointError):
        mergekit_lite.open_checkpoint("s")


def test_a_linked_folder_is_not_followed_out(place: Path) -> None:
    write_pipeline(place / "elsewhere", 0)
    write_pipeline(place / "a", 0)
    write_pipeline(place / "b", 1)
    shutil.rmtree(place / "b" / "unet")
    (place / "b" / "unet").symlink_to(place / "elsewhere" / "unet")
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        mergekit_lite.open_checkpoint("b")
    (place / "b" / "unet").unlink()
    shutil.copytree(place / "elsewhere" / "unet", place / "b" / "unet")
    shutil.rmtree(place / "b" / "scheduler")
    (place / "b" / "scheduler").symlink_to(place / "elsewhere" / "scheduler")
    mergekit_lite.extrapolate("a", "b", "out", 0.5)
    assert not (place / "out" / "scheduler").exists()


@pytest.mark.parametrize("content", ["[1]", "no JSON", '{"unet": 1}', "[" * 5000])
def test_a_list_that_lists_nothing(place: Path, content: str) -> None:
    write_pipeline(place / "a", 0)
    (place / "a" / "model_index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model_index.json: is not valid JSON|holds no weights"):
        mergekit_lite.open_checkpoint("a")


def test_an_adapter_is_for_one_of_the_models(place: Path) -> None:
    write_pipeline(place / "a", 0)
    write_adapter(place / "ad", lora("unet.conv", 4, 4))
    with pytest.raises(CheckpointError, match=r"a: is a folder of several models.*a/text_encoder\+ad"):
        mergekit_lite.open_checkpoint("a+ad")


def test_verify_finds_damage_in_a_part(place: Path) -> None:
    write_pipeline(place / "a", 0)
    write_pipeline(place / "b", 1)
    mergekit_lite.extrapolate("a", "b", "out", 0.5, shard_size=160)
    for name in ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", "vae/config.json", "unet/extra.py",
                 "unet/diffusion_pytorch_model.safetensors.index.json"):  # fmt: skip
        path = place / "out" / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes((before or b"x")[:-1] + b"\x7f")
        findings = mergekit_lite.verify("out", samples=0).findings
        assert findings and findings[0].file in (name, path.name), name
        path.unlink() if before is None else path.write_bytes(before)
    assert mergekit_lite.verify("out", samples=0).sound
    manifest = place / "out" / "mergekit_lite_manifest.json"
    for elsewhere in ("../unet/model.safetensors", "/x.safetensors", "a/b/c/d.safetensors", "unet/../x.safetensors"):
        forged = json.loads(manifest.read_text())
        forged["files"][0]["name"] = elsewhere
        (place / "forged").mkdir(exist_ok=True)
        (place / "forged" / manifest.name).write_text(json.dumps(forged))
        with pytest.raises(mergekit_lite.MergekitLiteError, match="in no folder but that of a part"):
            mergekit_lite.verify("forged", samples=0)


# --- sentence-transformers


def test_no_module_loses_its_weights(place: Path) -> None:
    sft, aligned = write_sentences(place / "sft", 0), write_sentences(place / "aligned", 1)
    mergekit_lite.extrapolate("sft", "aligned", "out", 0.5, out_dtype="float32")
    assert files_of("out") == files_of("aligned")
    assert_same(stored(place / "out"), extrapolated(sft, aligned, 0.5))
    assert json.loads((place / "out" / "2_Dense" / "config.json").read_text()) == DENSE
    assert mergekit_lite.verify("out", samples="all").sound
    mergekit_lite.extrapolate("sft", "aligned", "copy", 0.5, exclude=["^2_Dense/"])
    assert_same(stored(place / "copy"), extrapolated(sft, aligned, 0.5) | {"2_Dense": aligned["2_Dense"]})


def test_modules_in_torch_files_and_in_folders_of_their_own(place: Path) -> None:
    modules = [{**MODULES[0], "path": "0_Transformer"}, *MODULES[1:]]
    parts = []
    for seed, name in enumerate(("sft", "aligned")):
        own = write_sentences(place / name, seed, modules)
        (place / name / "0_Transformer").mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json"):
            (place / name / file).rename(place / name / "0_Transformer" / file)
        (place / name / "2_Dense" / "model.safetensors").unlink()
        torch.save(own["2_Dense"], place / name / "2_Dense" / "pytorch_model.bin")
        parts.append({"0_Transformer": own[""], "2_Dense": own["2_Dense"]})
    mergekit_lite.extrapolate("sft", "aligned", "out", 0.5)
    renamed = {name.replace("pytorch_model.bin", "model.safetensors") for name in files_of("aligned")}
    assert files_of("out") == renamed
    assert_same(stored(place / "out"), extrapolated(parts[0], parts[1], 0.5))


def test_the_modules_of_a_router(place: Path) -> None:
    router = {"types": {f"{route}_0_Transformer": MODULES[0]["type"] for route in ("query", "document")}}
    for name in ("sft", "aligned"):
        write_small(place / name, {"modules.json": [MODULES[0] | {"type": "Router"}], "router_config.json": router})
        for number, folder in enumerate(router["types"]):
            write_folder(place / name / folder, tuned(state(0), number))
    mergekit_lite.extrapolate("sft", "aligned", "out", 0.5)
    assert files_of("out") == files_of("aligned")
    assert_same(stored(place / "out"), stored(place / "aligned"))


def test_a_module_that_lacks_its_weights(place: Path) -> None:
    write_sentences(place / "a", 0)
    (place / "a" / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2_Dense/ \(Dense\)"):
        mergekit_lite.open_checkpoint("a")


# --- value heads


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_value_head_is_a_part(place: Path, suffix: str) -> None:
    heads = []
    for seed, name in enumerate(("sft", "aligned")):
        write_folder(place / name, tuned(state(0), seed), shards=2)
        heads.append({"v_head.summary.weight": torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))})
        path = place / name / f"value_head.{suffix}"
        save_file(heads[-1], path) if suffix == "safetensors" else torch.save(heads[-1], path)
    mergekit_lite.extrapolate("sft", "aligned", "out", 0.5)
    assert_same(
        {"": load_file(place / "out" / "value_head.safetensors")}, extrapolated({"": heads[0]}, {"": heads[1]}, 0.5)
    )
    index = json.loads((place / "out" / "model.safetensors.index.json").read_text())
    assert "v_head.summary.weight" not in index["weight_map"]
    assert mergekit_lite.verify("out", samples="all").sound


@pytest.mark.parametrize("having", ["sft", "aligned"])
def test_a_value_head_that_one_model_lacks(place: Path, having: str) -> None:
    for seed, name in enumerate(("sft", "aligned")):
        write_folder(place / name, tuned(state(0), seed))
    head = {"v_head.summary.weight": torch.ones(1, 8), "v_head.summary.bias": torch.ones(1)}
    save_file(head, place / having / "value_head.safetensors")
    plan = mergekit_lite.plan_extrapolation("sft", "aligned", "out", 0.5)
    told = str(plan.notes) + str([job.why for job in plan.copied])
    assert "a value head, which training alone reads" in told
    mergekit_lite.run(plan)
    written = place / "out" / "value_head.safetensors"
    assert written.exists() == (having == "aligned")
    if written.exists():
        assert_same({"": load_file(written)}, {"": head})


def test_weights_beside_an_adapter_are_named(place: Path) -> None:
    write_folder(place / "base", {"b.weight": torch.ones(4, 4)})
    write_adapter(place / "ad", lora("b", 4, 4))
    torch.save({"v_head.summary.weight": torch.ones(1, 8)}, place / "ad" / "pytorch_model.bin")
    left = mergekit_lite.open_checkpoint("base+ad").left_out
    assert left["pytorch_model.bin of ad"] == "lies beside the adapter, and is no part of it"
