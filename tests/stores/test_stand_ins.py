"""Paths that stand in for URLs: text is the URL, the system gets the path, whatever is made of them stays one."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

from mergekit_lite.checkpoint.stores.files import StorePath
from mergekit_lite.checkpoint.stores.mirror import _name
from mergekit_lite.checkpoint.stores.source import DESCRIPTION, is_name


def test_paths(tmp_path: Path) -> None:
    names = ["config.json", "inner", "inner/x.bin", "m.safetensors"]
    (tmp_path / "base" / "inner").mkdir(parents=True)
    for name in ("config.json", "inner/x.bin", "m.safetensors"):
        (tmp_path / "base" / name).write_text("{}")
    files = {name: [f"s3://b/base/{name}", 2, "etag"] for name in ("m.safetensors", "inner/x.bin")}
    (tmp_path / DESCRIPTION).write_text(json.dumps({"url": "s3://b/base", "files": files}))
    folder = StorePath(tmp_path / "base")
    file = folder / "m.safetensors"
    assert str(folder) == f"{folder}" == "s3://b/base" and os.fspath(folder) == str(tmp_path / "base")
    assert sorted(map(str, folder.rglob("*"))) == [f"s3://b/base/{name}" for name in names]
    assert sorted(map(str, folder.iterdir())) == [f"s3://b/base/{name}" for name in names if "/" not in name]
    assert all(isinstance(each, StorePath) and each.exists() for each in folder.iterdir())
    assert [each.relative_to(folder).as_posix() for each in folder.rglob("*.bin")] == ["inner/x.bin"]
    assert file.resolve() == file and hash(file) == hash(folder / file.name) and file.parent == folder
    assert file.remote is not None and file.remote.url == str(file) and (folder / "inner").remote is None
    assert (folder / "inner" / ".." / "config.json").resolve() == folder / "config.json"
    assert file.stat().st_size == 2 and file.read_text() == "{}" and file.with_name("config.json").is_file()
    sent = pickle.loads(pickle.dumps(file))
    assert (sent, str(sent), sent.remote) == (file, str(file), file.remote)


def test_names_that_servers_give_lead_nowhere() -> None:
    for name in ("", ".", "..", "a/b", "../x", "a\\b", "a\0b", "a\nb", "x" * 300, "\ud800", DESCRIPTION.title()):
        assert not is_name(name), name
    assert is_name("model-00001-of-00002.safetensors") and is_name("ключ.json")
    for url in ("s3://b/..", f"s3://b/{DESCRIPTION}", "s3://b/x\n", "hf://org/name@main", "s3://b/one/"):
        assert _name(url) in ("model", "name", "one")
