"""Runs into object stores that were killed: gone on with from anywhere, and only with what is proven."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import safetensors.torch
import torch
import xxhash
from safetensors.torch import load_file

import mergekit_lite
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.stores import read_ahead
from mergekit_lite.checkpoint.stores.files import Mirror, StorePath, know
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.engine import remote
from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.object_stores import Place, parse_place
from mergekit_lite.output import remote_target, remote_workspace
from mergekit_lite.output.remote_target import RemoteFolder
from tests import processes
from tests.models import state, tree_bytes, tuned, write_folder
from tests.remote.object_store import long_after, set_up, spoiling
from tests.remote.outputs import MANIFEST, SHARD, extrapolate, under, without_card
from tests.stores.object_stores import Store


def command(output: str) -> list[str]:
    target = ["-o", output, "--shard-size", str(SHARD)]
    return ["extrapolate", "sft", "dpo", "--alpha", "0.3", "--threads", "1", *target]


def killed(place: Path, server: Store, name: str) -> None:
    """Run the command until three shards are journalled, and kill it; the store takes its time, and no fourth one."""
    with spoiling(server, delay=0.05, hold="model-00004") as (store, _):
        before = partial(set_up, store.environment)
        with processes.started(place, *command(store / name), before=before) as process:
            until = time.monotonic() + 600
            while process.running and sum(key.startswith(f".{name}.") for key in journals(server)) < 3:
                assert time.monotonic() < until, "nothing is journalled"
                time.sleep(0.02)
            process.send(signal.SIGKILL)
            process.end()


def journals(store: Store) -> list[str]:
    """The keys of the journals of finished shards."""
    return [key for key in store.written() if key.endswith(".jsonl")]


def test_a_shard_that_another_run_wrote(store: Store, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was thought dead may still be sending: no manifest describes what it sent."""
    standing = remote_workspace.standing

    def meddled(output: Place) -> dict[str, int]:
        there = standing(output)
        if shards := sorted(name for name in there if name.startswith("model-")):
            RemoteFolder(output).put(shards[0], bytes(there[shards[0]]))
        return there

    with monkeypatch.context() as patch:
        patch.setattr(remote_workspace, "standing", meddled)
        with pytest.raises(RunError, match=r"another run wrote there meanwhile(?s:.*)model-00001"):
            extrapolate(models, store / "meddled")
    assert MANIFEST not in under(store, "meddled")
    extrapolate(models, store / "meddled", resume=True)
    assert without_card(under(store, "meddled")) == without_card(tree_bytes(models / "out"))


def test_inputs_elsewhere_are_held_to_their_etags() -> None:
    """Another etag is another file; bytes are not looked at."""
    place = parse_place("s3://bucket/out")
    files = [SimpleNamespace(path=path, etag="x") for path in ("s3://bucket/a.safetensors", "/b.safetensors")]
    plan = SimpleNamespace(inputs=[SimpleNamespace(files_read=files)])
    workspace = SimpleNamespace(
        place=place, journal={}, settled={0}, changed_sources={"s3://bucket/a.safetensors", "/b.safetensors"}
    )
    with pytest.raises(RunError, match=r"not those of the run that was stopped(?s:.*)s3://bucket/a") as refused:
        remote._check_sources(cast(Any, plan), cast(Any, workspace))
    assert "/b.safetensors" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "stopped_at"),
    [("lora", "config"), ("lora", "manifest"), ("v.safetensors", "manifest"), ("lora", "journals")],
)
def test_a_vector_stopped_behind_its_weights(
    store: Store, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stopped_at: str
) -> None:
    """The next run says how to go on, and does; the bytes are those of one that wasn't stopped."""
    settings: dict[str, Any] = {"format": "lora", "rank": 2} if name == "lora" else {}
    arguments = models / "sft", models / "dpo"
    output = store / f"stopped-{stopped_at}/{name}"
    mergekit_lite.extract_vector(*arguments, tmp_path / name, **settings)
    put, delete = RemoteFolder.put, RemoteFolder.delete

    def stopped_before(self: RemoteFolder, key: str, content: bytes) -> None:
        if key.endswith("manifest.json") if stopped_at == "manifest" else "config" in key:
            raise KeyboardInterrupt
        put(self, key, content)

    def stopped_behind(self: RemoteFolder, *keys: str) -> None:
        if any(key.endswith(".jsonl") for key in keys):
            raise KeyboardInterrupt
        delete(self, *keys)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        if stopped_at == "journals":
            patch.setattr(RemoteFolder, "delete", stopped_behind)
        else:
            patch.setattr(RemoteFolder, "put", stopped_before)
        mergekit_lite.extract_vector(*arguments, output, **settings)
        raise AssertionError("it wasn't stopped")
    with pytest.raises(UsageError, match=r"an earlier run was not finished(?s:.*)--resume goes on with it"):
        mergekit_lite.extract_vector(*arguments, output, **settings)
    extracted = mergekit_lite.extract_vector(*arguments, output, resume=True, **settings)
    assert extracted.output == output
    assert under(store, f"stopped-{stopped_at}") | tree_bytes(tmp_path) == under(store, f"stopped-{stopped_at}")
    assert not [key for key in under(store, f"stopped-{stopped_at}") if ".partial" in key]


def test_a_killed_run_goes_on_from_elsewhere(
    store: Store, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards are not made again; nothing is complete before the manifest."""
    killed(models, store, "killed")
    left, then = under(store, "killed"), store.written()
    shards = [name for name in left if name.startswith("model-")]
    finished = {name.rpartition("/")[2].removesuffix(".jsonl") for name in left if name.endswith(".jsonl")}
    assert MANIFEST not in left and "model.safetensors.index.json" not in left and 3 <= len(finished) < 6
    assert all(left[name] == (models / "out" / name).read_bytes() for name in shards)
    monkeypatch.setattr(remote_target, "DEAD", 0.0)
    elsewhere = tmp_path / "elsewhere"  # as on another machine: other paths, other times
    for name in ("sft", "dpo"):
        shutil.copytree(models / name, elsewhere / name, copy_function=shutil.copyfile)
    with pytest.raises(UsageError, match="--resume goes on"):
        extrapolate(models, store / "killed")
    extrapolate(elsewhere, store / "killed", resume=True)
    assert without_card(under(store, "killed")) == without_card(tree_bytes(models / "out"))
    now = store.written()
    assert {name for name in shards if now[f"killed/{name}"] == then[f"killed/{name}"]} == finished


def test_a_finished_shard_that_changed_or_inputs_that_did(
    store: Store, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(models, store, "changed")
    monkeypatch.setattr(remote_target, "DEAD", 0.0)
    first = min(key for key in store.written() if key.startswith("changed/model-00001-"))
    content = bytearray(store.get(first))
    content[-1] ^= 1
    store.put(first, bytes(content))
    other = state(9, layers=8, hidden=64, vocabulary=500)
    write_folder(tmp_path / "sft", other)
    write_folder(tmp_path / "dpo", tuned(other, 2), shards=2)
    with pytest.raises(RunError, match="not those of the run that was stopped"):
        extrapolate(tmp_path, store / "changed", resume=True)
    with pytest.raises(RunError, match="another plan"):
        extrapolate(models, store / "changed", 0.4, resume=True)
    extrapolate(models, store / "changed", resume=True)
    assert without_card(under(store, "changed")) == without_card(tree_bytes(models / "out"))


def stopped_merge(models: Path, output: str, patch: pytest.MonkeyPatch, **how: object) -> None:
    """Start a merge that ends when three shards are finished."""
    journal_file, number = remote_workspace.RemoteWorkspace._journal_file, 0

    def counted(*arguments: Any) -> None:
        nonlocal number
        number += 1
        if number > 3:
            raise RunError("stopped")
        journal_file(*arguments)

    with patch.context() as patched:
        patched.setattr(remote_workspace.RemoteWorkspace, "_journal_file", counted)
        with pytest.raises(RunError, match="stopped"):
            merge(models, output, **how)


def merge(models: Path, output: str, *, resume: bool = False, **how: object) -> None:
    """Merge dpo onto sft by TIES, as the command names them."""
    recipe = {"merge_method": "ties", "base_model": "sft", "models": [{"model": "dpo"}]}
    with contextlib.chdir(models):
        settings = {"shard_size": SHARD, "threads": 1, "resume": resume}
        mergekit_lite.merge({**recipe, "parameters": {"weight": 1.0, "density": 0.5, **how}}, output, **settings)


def test_any_byte_of_an_input_that_changed_is_seen(
    store: Store, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever bytes of a finished shard it is in; what is in another shard is made again anyway."""
    output = store / "other-byte"
    stopped_merge(models, output, monkeypatch)
    finished = [each.removesuffix(".jsonl") for each in under(store, "other-byte") if each.endswith(".jsonl")]
    shards = [under(store, "other-byte")[name.rpartition("/")[2]] for name in finished]
    written = [name for shard in shards for name in safetensors.torch.load(shard)]
    for name in written:
        place = tmp_path / name
        shutil.copytree(models, place, ignore=shutil.ignore_patterns("out"))
        [file] = [path for path in (place / "dpo").glob("*.safetensors") if name in load_file(path)]
        with safetensors.safe_open(file, "pt") as opened:
            tensors = {each: opened.get_tensor(each) for each in opened.keys()}  # noqa: SIM118
        tensors[name].view(torch.int16).flatten()[-1] ^= 1
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(RunError, match=rf"not those of the run that was stopped(?s:.*){file.name}"):
            merge(place, output, resume=True)
    merge(models, str(tmp_path / "wanted"))
    elsewhere = tmp_path / written[0]
    shutil.copytree(models, elsewhere, ignore=shutil.ignore_patterns("out"), dirs_exist_ok=True)
    merge(elsewhere, output, resume=True)
    assert without_card(under(store, "other-byte")) == without_card(tree_bytes(tmp_path / "wanted"))


def test_statistics_of_inputs_with_other_times(
    store: Store, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No span's digest tells what a threshold of the whole model was made of."""
    stopped_merge(models, store / "global", monkeypatch, trim="global")
    shutil.copytree(models, tmp_path / "copy", ignore=shutil.ignore_patterns("out"))
    with pytest.raises(RunError, match=r"statistics over several tensors(?s:.*)rsync -a(?s:.*)dpo/model-"):
        merge(tmp_path / "copy", store / "global", resume=True, trim="global")
    merge(models, store / "global", resume=True, trim="global")
    assert MANIFEST in under(store, "global")


def test_servers_without_etags_are_held_to_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(remote, "_others_by_digest", lambda plan, journal, paths: asked.append(paths) or set())
    files = [
        SimpleNamespace(path=f"https://host/{name}", etag=etag)
        for name, etag in {"a": "x", "b": "", "c": "W/x"}.items()
    ]
    promised = SimpleNamespace(path="/tmp/half.safetensors", etag="")  # by a document that is made while it is read
    plan = SimpleNamespace(inputs=[SimpleNamespace(files=[promised], files_read=files)], jobs=[], outputs=[1])
    workspace = SimpleNamespace(place=parse_place("s3://b/o"), journal={}, settled={0}, changed_sources=set())
    remote._check_sources(cast(Any, plan), cast(Any, workspace))
    assert asked == [{"https://host/b", "https://host/c"}]


def test_digests_are_taken_of_what_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request after another would take as often as long as there are requests."""
    content = random.Random(0).randbytes(2 * read_ahead.BLOCK)
    know("/nowhere/stand-in", Mirror("https://host", {"m.safetensors": RemoteFile("https://host/m", len(content), "")}))
    spec = TensorSpec("w", "bfloat16", (len(content) // 2,), StorePath("/nowhere/stand-in/model/m.safetensors"), 0)
    together = threading.Barrier(2)

    def fetch(file: RemoteFile, begin: int, out: memoryview) -> None:
        together.wait(60)
        out[:] = content[begin : begin + len(out)]

    monkeypatch.setattr(read_ahead, "fetch", fetch)
    with Reader() as reader:
        assert remote._digest_of(reader, spec, 0, spec.numel) == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["random", "random.safetensors"])
def test_kills_at_random_moments(
    store: Store, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draws = random.Random(seed)
    monkeypatch.setattr(remote_target, "DEAD", 0.0)
    extrapolate(models, str(tmp_path / output), threads=1)
    wanted = without_card(tree_bytes(tmp_path / output if output == "random" else tmp_path))
    for number in range(8):
        key = f"{output}-{number}/{output}"
        while draws.random() < 0.7:
            with spoiling(store, delay=0.05) as (slow, _):
                before = partial(long_after, slow.environment)
                with processes.started(models, *command(slow / key), "--resume", before=before) as process:
                    time.sleep(draws.uniform(0.2, 2.5))
                    process.send(signal.SIGKILL)
                    process.end()
            left = without_card(under(store, f"{output}-{number}/random"))
            assert all(wanted[name] == content for name, content in left.items() if name in wanted)
        extrapolate(models, store / key, resume=True)
        assert without_card(under(store, f"{output}-{number}/random")) == wanted
