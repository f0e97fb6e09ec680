"""Files that don't belong to an output are named, whatever they are called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import mergekit_lite
from tests.verification.outputs import extrapolated, invoke

ADDED = (
    "tokenizer.json", "generation_config.json", "adapter_config.json", "modeling_evil.py", "tf_model.h5", "x.gguf",
    "flax_model.msgpack", "x.SAFETENSORS", "optimizer.bin", "training_args.bin", "pytorch_model.bin.index.json",
    "MODEL.safetensors", "Config.json", "readme.md", "chat_template.jinja", "README.md.py", "x\ny", "\u202ex",
    os.fsdecode(b"caf\xe9.json"), "additional_chat_templates/x.jinja", "onnx/deep/model.onnx", "1_Pooling/config.json",
)  # fmt: skip


def test_every_file_that_was_added_is_named(place: Path) -> None:
    (place / "b" / "tokenizer.json").unlink()
    (output,) = extrapolated()
    for name in ADDED:
        assert not (output / name).exists()
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    verdict = mergekit_lite.verify(output, samples=0)
    told = {finding.file for finding in verdict.findings}
    assert told == {name if "/" not in name else f"{name.partition('/')[0]}/" for name in ADDED}
    assert all("is not a part of this output" in finding.what for finding in verdict.findings)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "link to a folder"])
def test_strangers_of_every_kind(place: Path, kind: str) -> None:
    (output,) = extrapolated()
    path = output / "x"
    {"link": lambda: path.symlink_to("/etc/passwd"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir,
     "link to a folder": lambda: path.symlink_to("/etc")}[kind]()  # fmt: skip
    (finding,) = mergekit_lite.verify(output, samples=0).findings
    assert finding.file == ("x/" if kind == "folder" else "x")


def test_a_file_within_a_folder_of_the_output(place: Path) -> None:
    (place / "b" / "additional_chat_templates").mkdir()
    (place / "b" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (output,) = extrapolated()
    assert mergekit_lite.verify(output, samples=0).sound
    (output / "additional_chat_templates" / "more.jinja").write_text("more")
    (finding,) = mergekit_lite.verify(output, samples=0).findings
    assert finding.file == "additional_chat_templates/more.jinja"


def test_the_card_is_the_users_and_hidden_files_are_noted(place: Path) -> None:
    (output,) = extrapolated()
    (output / "README.md").write_text("mine")
    (output / ".gitattributes").write_text("* lfs")
    (output / ".git" / "hooks").mkdir(parents=True)
    code, text = invoke("out", "--samples", "0")
    assert code == 0 and "out is sound" in text
    for name in (".gitattributes", ".git/"):
        assert f"note: {name} is not a part of this output; nothing that loads models reads" in text
    (output / "README.md").unlink()
    assert mergekit_lite.verify(output, samples=0).sound
    (output / "README.md").symlink_to("/etc/passwd")
    (finding,) = mergekit_lite.verify(output, samples=0).findings
    assert finding.file == "README.md" and "leaves its folder" in finding.what


def test_a_manifest_that_is_a_pipe(place: Path) -> None:
    (output,) = extrapolated()
    path = output / "mergekit_lite_manifest.json"
    path.unlink()
    os.mkfifo(path)
    code, text = invoke("out")
    assert code == 1 and "mergekit_lite_manifest.json: is not a regular file" in text
