"""Which files of a folder are its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.errors import CheckpointError
from tests.checkpoint.reading import assert_reads_as

SHARDS = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}


def weights(folder: Path, *files: str, **tensors: torch.Tensor) -> Path:
    """Each file with tensors ``a`` … of its own, or those given."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        content = tensors or {"a": torch.ones(2)}
        if file.endswith(".safetensors"):
            save_file(content, folder / file)
        else:
            torch.save(content, folder / file)
    return folder


def sharded(folder: Path, with_index: bool = True, **changes: str) -> Path:
    for file, name in SHARDS.items():
        weights(folder, file, **{name: torch.full((2,), float(ord(name)))})
    if with_index:
        weight_map = {name: file for file, name in SHARDS.items()} | changes
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refusal(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_with_and_without_an_index(tmp_path, with_index):
    sharded(tmp_path, with_index)
    checkpoint = assert_reads_as(tmp_path, {name: torch.full((2,), float(ord(name))) for name in "ab"})
    assert [file.path.name for file in checkpoint.files] == list(SHARDS)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "weights.safetensors", "merged.pt", "x.pth"]
)
def test_one_file_of_any_name_beside_others(tmp_path, file):
    weights(tmp_path, file)
    for other in ("training_args.bin", "README.md", "tokenizer.model", "config.json"):
        (tmp_path / other).write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert [opened.path.name for opened in checkpoint.files] == [file]
    assert checkpoint.config == {} and checkpoint.folder == tmp_path.resolve()
    assert open_checkpoint(tmp_path / file).config is None


def test_safetensors_come_before_bin_and_standard_names_before_others(tmp_path):
    weights(tmp_path, "pytorch_model.bin", "model.safetensors", "consolidated.safetensors")
    assert [file.path.name for file in open_checkpoint(tmp_path).files] == ["model.safetensors"]


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path / "index") / "model-00002-of-00002.safetensors").unlink()
    (sharded(tmp_path / "bare", with_index=False) / "model-00001-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(tmp_path / "index")
    assert "model-00001-of-00002.safetensors" in refusal(tmp_path / "bare")


@pytest.mark.parametrize(
    "files",
    [
        ["model.safetensors", "model.safetensors.index.json"],
        ["a.safetensors", "b.safetensors"],
        ["a-00001-of-00002.safetensors", "b-00001-of-00002.safetensors"],
        ["a-00001-of-00002.safetensors", "a-00001-of-00003.safetensors"],
        ["a-00003-of-00002.safetensors"],
        ["a-00001-of-00000.safetensors"],
        ["a-00001-of-00001.safetensors", "adapter_model.safetensors"],
        ["a.pt", "b.pth"],
    ],
    ids=str,
)
def test_where_it_is_not_clear_which_files_are_meant_all_are_named(tmp_path, files):
    weights(tmp_path, *(file for file in files if not file.endswith(".json")))
    for file in files:
        if file.endswith(".json"):
            (tmp_path / file).write_text("{}")
    message = refusal(tmp_path)
    assert all(file in message for file in files)


def test_index_and_shards_that_disagree(tmp_path):
    first, second = SHARDS
    assert "the index says" in refusal(sharded(tmp_path / "swapped", a=second))
    assert "no shard has it" in refusal(sharded(tmp_path / "more", c=first))
    folder = sharded(tmp_path / "less")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first}}))
    assert open_checkpoint(folder).tensors.keys() == {"a"}  # a file that the index doesn't name isn't part of the model
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first, "c": second}}))
    assert "the index lacks it" in refusal(folder)


def test_a_tensor_in_two_shards(tmp_path):
    for file in SHARDS:
        weights(tmp_path, file)
    message = refusal(tmp_path)
    assert "stored twice" in message and all(file in message for file in SHARDS)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"weight_map": {}}', '{"weight_map": []}', "{", "\ufeff{}", "[" * 100_000]
)
def test_a_broken_index(tmp_path, text):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_a_broken_config(tmp_path):
    weights(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    assert "config.json: is not valid JSON" in refusal(tmp_path)


def test_no_weights(tmp_path):
    assert "holds no weights" in refusal(tmp_path)
    (tmp_path / "model.Q4_K_M.gguf").touch()
    assert "GGUF" in refusal(tmp_path)
    assert "GGUF" in refusal(tmp_path / "model.Q4_K_M.gguf")
    (tmp_path / "model.onnx").touch()
    assert "not a weight file" in refusal(tmp_path / "model.onnx")


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_no_model(tmp_path, with_config):
    weights(tmp_path, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    if with_config:  # trainers put that of the base beside it
        (tmp_path / "config.json").write_text("{}")
    assert "LoRA adapter" in refusal(tmp_path)


def test_a_model_beside_an_adapter_is_a_model(tmp_path):
    weights(tmp_path, "adapter_model.safetensors", "model.safetensors")
    for config in ("adapter_config.json", "config.json"):
        (tmp_path / config).write_text("{}")
    assert [file.path.name for file in open_checkpoint(tmp_path).files] == ["model.safetensors"]


def test_numbered_shards_come_before_the_consolidated_file(tmp_path):
    sharded(tmp_path, with_index=False)
    weights(tmp_path, "consolidated.safetensors")
    assert [file.path.name for file in open_checkpoint(tmp_path).files] == list(SHARDS)


def test_odd_references(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for reference in ("x" * 5000, "~nobody-of-this-name/x", "a\0b", "missing", ""):
        if reference:
            refusal(reference)
    weights(tmp_path, "x.safetensors")
    assert open_checkpoint("x.safetensors").path == tmp_path.resolve() / "x.safetensors"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/x.safetensors").tensors.keys() == {"a"}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything, all on Windows too")
def test_files_that_may_not_be_read(tmp_path):
    weights(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors").chmod(0)
    assert "Permission denied" in refusal(tmp_path)
