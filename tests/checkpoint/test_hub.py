"""Fetching from a hub: a real server on this machine, a fresh process and cache for each fetch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from mergekit_lite.checkpoint.hub import fetch
from mergekit_lite.errors import CheckpointError
from tests.adapters import CONFIG, lora
from tests.checkpoint.hub_server import Repository, serve

OLD, NEW = "a" * 40, "b" * 40
FETCH = """
import json, sys
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.errors import CheckpointError
answers = []
for reference in sys.argv[1:]:
    try:
        opened = open_checkpoint(reference)
        first = next(iter(opened.tensors.values()))
        with first.file.open("rb") as file:
            file.seek(first.offset)
            answers.append({"folder": str(opened.path), "revision": opened.revision, "tensors": sorted(opened.tensors),
                            "files": sorted(str(path.relative_to(opened.path)) for path in opened.path.rglob("*")),
                            "bytes": file.read(first.nbytes).hex()})
    except CheckpointError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""


def fetched(cache: Path, *references: str, url: str = "http://127.0.0.1:9", offline: bool = False) -> list[dict]:
    """Open references in a fresh process, one after the other: what was found, or the message."""
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
    }
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", FETCH, *references]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def shards(value: float = 1.0) -> dict[str, bytes]:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    return {
        "model.safetensors.index.json": json.dumps(index).encode(),
        names[0]: save({"a": torch.full((4,), value)}),
        names[1]: save({"b": torch.full((4,), -value)}),
    }


BESIDE = {
    name: json.dumps({"file": name}).encode()
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "preprocessor_config.json",
        "tokenizer.model",
        "merges.txt",
        "LICENSE",
        "README.md",
    )
}
UNWANTED = dict.fromkeys(
    (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "onnx/model.onnx",
        "model.Q4_K_M.gguf",
        "tf_model.h5",
        "modeling_tiny.py",
        "tokenization_tiny.py",
        "figures/config.json",
        "training_args.bin",
        ".gitattributes",
    ),
    b"no",
)
MAIN = shards() | BESIDE | UNWANTED


def repository(**changes) -> Repository:
    return Repository({"main": NEW, "v1": OLD, "refs/pr/1": OLD}, {NEW: MAIN, OLD: shards(2.0) | BESIDE}, **changes)


def test_fetch_takes_what_is_needed_and_works_offline_after(tmp_path):
    with serve({"org/tiny": repository()}) as hub:
        [first] = fetched(tmp_path, "org/tiny", url=hub.url)
        assert hub.downloads == set(shards()) | set(BESIDE)
        assert first["tensors"] == ["a", "b"] and first["revision"] == NEW
        assert set(first["files"]) == set(shards()) | set(BESIDE) | {"additional_chat_templates"}
        assert first["bytes"] == torch.ones(4).numpy().tobytes().hex()
        hub.asked.clear()
        assert fetched(tmp_path, "org/tiny", url=hub.url) == [first]
        assert not hub.downloads
        hub.status = 503
        assert fetched(tmp_path, "org/tiny", url=hub.url) == [first]
    assert fetched(tmp_path, "org/tiny", f"org/tiny@{NEW}", offline=True) == [first, first]
    assert fetched(tmp_path, "org/tiny") == [first]  # nobody listens


def test_a_revision_is_that_commit(tmp_path):
    with serve({"org/tiny": repository()}) as hub:
        answers = fetched(tmp_path, "org/tiny@v1", f"org/tiny@{OLD}", "org/tiny@refs/pr/1", "org/tiny@v9", url=hub.url)
    assert [answer["revision"] for answer in answers[:3]] == [OLD] * 3
    assert answers[0]["bytes"] == torch.full((4,), 2.0).numpy().tobytes().hex()
    assert "no branch, tag or commit 'v9'" in answers[3]["error"]


def test_a_push_while_fetching_is_noticed(tmp_path):
    with serve({"org/tiny": repository(pushed=OLD)}) as hub:
        first, second = fetched(tmp_path, "org/tiny", "org/tiny", url=hub.url)
    assert "was changed on the hub while it was fetched" in first["error"] and second["revision"] == OLD


def test_torch_files_are_taken_where_there_is_nothing_better(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "weights")
    files = {"pytorch_model.bin": (tmp_path / "weights").read_bytes(), "config.json": b"{}", "model.gguf": b"no"}
    with serve({"org/old": Repository({"main": NEW}, {NEW: files})}) as hub:
        [answer] = fetched(tmp_path, "org/old", url=hub.url)
        assert answer["tensors"] == ["a"] and hub.downloads == {"pytorch_model.bin", "config.json"}


def test_a_partial_cache_is_not_enough(tmp_path):
    with serve({"org/tiny": repository()}) as hub:
        [answer] = fetched(tmp_path, "org/tiny", url=hub.url)
    for name in ("model-00002-of-00002.safetensors", "tokenizer.json"):
        link = Path(answer["folder"]) / name
        target = link.readlink()
        link.unlink()
        [refused] = fetched(tmp_path, "org/tiny", offline=True)
        assert "HF_HUB_OFFLINE is set" in refused["error"] and "cache doesn't hold all" in refused["error"]
        link.symlink_to(target)
    [unknown] = fetched(tmp_path, "org/never", offline=True)
    assert "HF_HUB_OFFLINE is set" in unknown["error"] and "Connect and run again" in unknown["error"]


@pytest.mark.parametrize("denied", [(401, "GatedRepo"), (403, "GatedRepo"), (403, None)])
def test_gated(tmp_path, denied):
    with serve({"org/gated": repository(denied=denied)}) as hub:
        [answer] = fetched(tmp_path, "org/gated", url=hub.url)
        assert "hf auth login" in answer["error"] and f"{hub.url}/org/gated" in answer["error"]


def test_what_the_hub_lacks_or_can_not_tell(tmp_path):
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": save({"a": torch.ones(1)})}
    ambiguous = MAIN | {"model.safetensors": save({"a": torch.ones(1)})}
    missing = {name: content for name, content in MAIN.items() if "00002-of" not in name}
    hostile = MAIN | {"model.safetensors.index.json": b'{"weight_map": {"a": "../../../x.safetensors"}}'}
    repositories = {
        f"org/{name}": Repository({"main": NEW}, {NEW: files})
        for name, files in {
            "adapter": adapter,
            "ambiguous": ambiguous,
            "missing": missing,
            "hostile": hostile,
            "gguf": {"model.gguf": b"no"},
            "empty": {},
        }.items()
    }
    with serve(repositories) as hub:
        names = ["none", *(name.removeprefix("org/") for name in repositories)]
        answers = fetched(tmp_path, *(f"org/{name}" for name in names), url=hub.url)
    expected = {
        "none": "has no such model, or it is private",
        "adapter": "BASE+org/adapter",
        "ambiguous": "holds both",
        "missing": "upload is incomplete",
        "hostile": "not weight files of this folder",
        "gguf": "GGUF",
        "empty": "holds no weights",
    }
    for name, answer in zip(names, answers, strict=True):
        assert expected[name] in answer["error"], (name, answer)


@pytest.mark.parametrize(
    "reference",
    [
        "nothing-here",
        "./org/name",
        "/org/name",
        "org/name/more",
        "org/model.safetensors",
        "",
        "@main",
        "a/b@",
        "a/b@..",
        "~/x",
        "org/na\0me",
        "\ud800/x",
        "x" * 5000,
        "a/b@../../x",
        "~nobody-of-this-name/x",
    ],
)
def test_what_is_neither_a_path_nor_a_repository_is_a_path_not_found(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        fetch(reference)


def test_the_nearest_sibling_is_suggested(tmp_path):
    (tmp_path / "llama-tuned").mkdir()
    with pytest.raises(CheckpointError, match="Did you mean 'llama-tuned'"):
        fetch(str(tmp_path / "llama-tune"))


def test_an_adapter_and_its_base(tmp_path):
    adapter = {
        "adapter_config.json": json.dumps(CONFIG).encode(),
        "adapter_model.safetensors": save(lora("b", 1, 1)),
        "adapter_model.bin": b"no",
        "tokenizer.json": b"{}",
        "optimizer.pt": b"no",
    }
    base = {"config.json": b"{}", "model.safetensors": save({"b.weight": torch.ones(1, 1)})}
    repositories = {
        "org/base": Repository({"main": NEW}, {NEW: base}),
        "org/lora": Repository({"main": NEW, "v1": OLD}, {NEW: {}, OLD: adapter}),
    }
    with serve(repositories) as hub:
        [answer, bare] = fetched(tmp_path, "org/base+org/lora@v1", "org/base+org/lora", url=hub.url)
        assert hub.downloads == {*base, "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert answer["tensors"] == ["b.weight"] and "is not an adapter" in bare["error"]
    assert fetched(tmp_path, "org/base+org/lora@v1", offline=True) == [answer]
    next(tmp_path.rglob("snapshots/*/adapter_config.json")).unlink()
    [refused] = fetched(tmp_path, "org/base+org/lora@v1", offline=True)
    assert "cache doesn't hold all" in refused["error"]


def test_a_pipeline_is_fetched_part_by_part(tmp_path):
    from tests.checkpoint.pipelines import write_pipeline

    write_pipeline(tmp_path / "local", 0)
    wanted = {
        path.relative_to(tmp_path / "local").as_posix(): path.read_bytes()
        for path in (tmp_path / "local").rglob("*")
        if path.is_file()
    }
    more = {
        "v1-5-pruned.safetensors": b"no",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"no",
        "unet/diffusion_pytorch_model.bin": b"no",
        "unet/model.onnx": b"no",
        "vae/code.py": b"no",
        "onnx/unet/model.onnx": b"no",
        "../outside.json": b"no",
    }
    head = shards() | {
        "config.json": b"{}",
        "value_head.safetensors": save({"v_head.summary.weight": torch.ones(1, 4)}),
    }
    hostile = wanted | {"model_index.json": b'{"../unet": ["diffusers", "UNet2DConditionModel"]}'}
    repositories = {
        f"org/{name}": Repository({"main": NEW}, {NEW: files})
        for name, files in {"pipe": wanted | more, "head": head, "hostile": hostile}.items()
    }
    with serve(repositories) as hub:
        answer, of_head, refused = fetched(tmp_path, "org/pipe", "org/head", "org/hostile", url=hub.url)
        assert hub.downloads == set(wanted) | set(head)
    assert {name for name in answer["files"] if "." in name} == set(wanted)
    assert {name.partition("/")[0] for name in answer["tensors"]} == {"text_encoder", "unet", "vae"}
    assert of_head["tensors"] == ["a", "b", "v_head.summary.weight"]
    assert "lists what can't be folders of this model" in refused["error"]
    assert fetched(tmp_path, "org/pipe", "org/head", offline=True) == [answer, of_head]
    (Path(answer["folder"]) / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    [incomplete] = fetched(tmp_path, "org/pipe", offline=True)
    assert "cache doesn't hold all" in incomplete["error"]
