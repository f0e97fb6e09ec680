"""Outputs in object stores: the bytes of a disk's, complete or absent, whatever fails and whenever a run is killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import safetensors.torch
import torch
import yaml
from safetensors.torch import load_file

import mergekit_lite
from mergekit_lite.engine import remote
from mergekit_lite.errors import MergekitLiteError, RunError, UsageError
from mergekit_lite.object_stores import Place, parse_place
from mergekit_lite.output import remote_target, remote_workspace, upload
from mergekit_lite.output.remote_target import Lock, RemoteFolder
from mergekit_lite.output.spool import Spool
from mergekit_lite.output.upload import Extent, Upload, Uploaded
from tests import processes
from tests.models import state, tree_bytes, tuned, write_folder
from tests.remote.object_store import KEY, SECRET, Store, make_dead, serving, set_up, spoiling

MANIFEST = "mergekit_lite_manifest.json"
SHARD = 50_000  # bytes
Objects = dict[str, bytes]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft and dpo, and what extrapolating them makes on a disk."""
    place = tmp_path_factory.mktemp("models")
    sft = state(1, layers=8, hidden=64, vocabulary=500)
    write_folder(place / "sft", sft)
    write_folder(place / "dpo", tuned(sft, 2), shards=2)
    extrapolate(place, "out", threads=1)
    return place


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with serving(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    use(server, monkeypatch)
    return server


def use(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lite import object_stores

    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    object_stores._store.cache_clear()


def extrapolate(
    models: Path, output: str, alpha: float | list[float] = 0.3, **options: object
) -> mergekit_lite.Finished:
    """Extrapolate models that are named as the command names them: their names are part of the plan."""
    settings = {"shard_size": SHARD, "threads": 2, **options}
    here = Path.cwd()
    os.chdir(models)
    try:
        return mergekit_lite.extrapolate("sft", "dpo", output, alpha, **settings)
    finally:
        os.chdir(here)


def under(store: Store, prefix: str) -> Objects:
    """The objects of an output and of what is beside it, by their names in it."""
    name = prefix.rpartition("/")[2]
    return {
        key.removeprefix(f"{prefix}/"): content
        for key, content in store.objects().items()
        if key.startswith(prefix) or f"/.{name}." in f"/{key}"
    }


def without_card(objects: Objects) -> Objects:
    """All but the card, which has the output's name in it."""
    return {name: content for name, content in objects.items() if name != "README.md"}


def test_the_bytes_are_those_of_a_disk(store: Store, models: Path) -> None:
    finished = extrapolate(models, "s3://bucket/a/same")
    assert without_card(under(store, "a/same")) == without_card(tree_bytes(models / "out"))
    assert finished.outputs == ("s3://bucket/a/same",) and len(tree_bytes(models / "out")) > 8
    assert extrapolate(models, "s3://bucket/a/same", resume=True).reports == finished.reports
    assert not list(remote_workspace.spool_folder().glob(".mergekit-lite-*same.partial"))


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("pt", marks=pytest.mark.slow)])
def test_single_files_of_several_alphas(store: Store, models: Path, tmp_path: Path, suffix: str) -> None:
    name = f"o-{{alpha}}.{suffix}"
    extrapolate(models, str(tmp_path / name), [0.3, 0.5])
    extrapolate(models, f"s3://bucket/single-{suffix}/{name}", [0.3, 0.5])
    assert under(store, f"single-{suffix}") == tree_bytes(tmp_path)


def test_from_a_store_into_a_store(store: Store, models: Path) -> None:
    for name in ("sft", "dpo"):
        for file, content in tree_bytes(models / name).items():
            RemoteFolder(parse_place(f"s3://bucket/in/{name}")).put(file, content)
    before = partial(set_up, store.environment)
    urls = ["s3://bucket/in/sft", "s3://bucket/in/dpo", "-o", "s3://bucket/both", "--shard-size", str(SHARD)]
    assert processes.run(models, "extrapolate", *urls, "--alpha", "0.3", before=before).returncode == 0
    made, wanted = under(store, "both"), tree_bytes(models / "out")
    assert {name: made[name] for name in wanted if name.startswith("model")} == {
        name: content for name, content in wanted.items() if name.startswith("model")
    }
    verified = processes.run(models, "verify", "s3://bucket/both", before=before)
    assert verified.returncode == 0 and "is sound" in verified.stdout
    touching = processes.run(models, "extrapolate", *urls[:3], "s3://bucket/in/dpo", "--alpha", "1", before=before)
    assert touching.returncode == 2 and "at the input" in touching.stderr


def test_documents_name_no_folder_of_this_machine(store: Store, models: Path, tmp_path: Path) -> None:
    """Neither a stand-in of what is read elsewhere nor what lies between documents: two machines make the same."""
    for name in ("sft", "dpo"):
        for file, content in tree_bytes(models / name).items():
            RemoteFolder(parse_place(f"s3://bucket/docs/{name}")).put(file, content)
    sft, dpo = ({"model": f"s3://bucket/docs/{name}", "parameters": {"weight": 0.5}} for name in ("sft", "dpo"))
    half = {"model": "half", "parameters": {"weight": 0.5}}
    documents = [
        {"merge_method": "linear", "models": [half, sft]},
        {"name": "half", "merge_method": "linear", "models": [sft, dpo]},
    ]
    made: list[Objects] = []
    for place in (tmp_path / "one", tmp_path / "two"):
        (place / "tmp").mkdir(parents=True)
        (place / "recipe.yml").write_text(yaml.safe_dump_all(documents))
        before = partial(set_up, {**store.environment, "TMPDIR": str(place / "tmp")})
        output = f"s3://bucket/{place.name}/out"
        done = processes.run(
            place, "merge", "recipe.yml", "-o", output, "--shard-size", str(SHARD), "--json", before=before
        )
        assert done.returncode == 0, done.stderr
        made.append(under(store, f"{place.name}/out"))
        for content in (*made[-1].values(), done.stdout.encode()):
            assert str(tmp_path).encode() not in content and b"mergekit-lite-" not in content
    assert made[0] == made[1] and MANIFEST in made[0]
    assert "- model: half\n" in made[0]["mergekit_config.yml"].decode()


def test_what_stands_there_is_replaced_only_when_asked(store: Store, models: Path) -> None:
    extrapolate(models, "s3://bucket/stands", 0.5)
    RemoteFolder(parse_place("s3://bucket/stands")).put("notes.txt", b"mine")
    before = under(store, "stands")
    for options in ({}, {"resume": True}):
        with pytest.raises(UsageError, match="exists"):
            extrapolate(models, "s3://bucket/stands", **options)
    assert under(store, "stands") == before
    extrapolate(models, "s3://bucket/stands", force=True)
    assert without_card(under(store, "stands")) == without_card(tree_bytes(models / "out"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("s3://bucket", "Name what is to be made"),
        ("s3://key:word@bucket/x", "has a user or a password"),
        ("s3://bucket/x?X-Amz-Signature=abc", "has a query"),
        ("https://example.org/x", "is not in an object store"),
    ],
)
def test_what_can_be_no_output(store: Store, models: Path, output: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        extrapolate(models, output)
    assert "word" not in str(caught.value).replace("password", "") and "abc" not in str(caught.value)


def test_requests_that_fail(server: Store, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in ten are answered 503 or cut: before they arrive, after, or within the answer."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    monkeypatch.setattr(upload, "PART", 1 << 16)  # several parts for each shard
    with spoiling(server, share=0.3, seed=seed) as (store, proxy):
        use(store, monkeypatch)
        extrapolate(models, "s3://bucket/spoilt")
    assert without_card(under(server, "spoilt")) == without_card(tree_bytes(models / "out"))
    failed = [how for _, _, how in proxy.seen if how]
    assert len(failed) > 0.15 * len(proxy.seen) and len(failed) > 5


def test_answers_that_the_client_does_not_ask_for_again(
    server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer of an upload, and a list."""
    spool = Spool(tmp_path)
    spool.write(0, memoryview(bytes(1000)))
    with spoiling(server, cut=["?uploads", "list-type=2"]) as (store, proxy):
        use(store, monkeypatch)
        sending = Upload(parse_place("s3://bucket/cut/file"), spool, 1000, lambda uploaded: None)
        sending.made(Extent(0, 1000))
        sending.complete()
        assert RemoteFolder(parse_place("s3://bucket/cut")).sizes() == {"file": 1000}
        assert not proxy.cut
    spool.close()


def test_access_that_is_refused(server: Store, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(server, monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "MARKEDwrong" + SECRET)
    with pytest.raises(MergekitLiteError) as caught:
        extrapolate(models, "s3://bucket/refused")
    assert "refused" in str(caught.value) and "AWS_ACCESS_KEY_ID" in str(caught.value)
    assert SECRET not in str(caught.value) and KEY not in str(caught.value)


def command(output: str) -> list[str]:
    target = ["-o", f"s3://bucket/{output}", "--shard-size", str(SHARD)]
    return ["extrapolate", "sft", "dpo", "--alpha", "0.3", "--threads", "1", *target]


def killed(place: Path, store: Store, journals: int) -> None:
    """Run the command until so many shards are journalled, and kill it."""
    told = store.bucket / ".killed.partial"
    before = partial(set_up, store.environment)
    with processes.started(place, *command("killed"), before=before) as process:
        until = time.monotonic() + 60
        while process.running and not (told.exists() and len(list(told.glob("*.jsonl"))) >= journals):
            assert time.monotonic() < until, "nothing is journalled"
            time.sleep(0.005)
        process.send(signal.SIGKILL)
        process.end()


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
            extrapolate(models, "s3://bucket/meddled")
    assert MANIFEST not in under(store, "meddled")
    extrapolate(models, "s3://bucket/meddled", resume=True)
    assert without_card(under(store, "meddled")) == without_card(tree_bytes(models / "out"))


def test_inputs_elsewhere_are_held_to_their_etags() -> None:
    """Another etag is another file; bytes are not looked at."""
    place = parse_place("s3://bucket/out")
    files = [SimpleNamespace(path=path, etag="x") for path in ("s3://bucket/a.safetensors", "/b.safetensors")]
    plan = SimpleNamespace(inputs=[SimpleNamespace(files=files)])
    workspace = SimpleNamespace(
        place=place, journal={}, settled={0}, changed_sources={"s3://bucket/a.safetensors", "/b.safetensors"}
    )
    with pytest.raises(RunError, match=r"not those of the run that was stopped(?s:.*)s3://bucket/a") as refused:
        remote._check_sources(cast(Any, plan), cast(Any, workspace))
    assert "/b.safetensors" not in str(refused.value)


@contextmanager
def slow(root: Path, hold: str = "") -> Iterator[Store]:
    """A store that takes its time, and takes no file of the name ``hold``."""
    with serving(root) as server, spoiling(server, delay=0.05, hold=hold) as (store, _):
        yield store


def test_a_killed_run_goes_on_from_elsewhere(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished shards are not made again; nothing is complete before the manifest."""
    with slow(tmp_path / "store", hold="model-00004") as store:
        killed(models, store, 3)
    left = under(store, "killed")
    shards = [name for name in left if name.startswith("model-")]
    finished = {name.rpartition("/")[2].removesuffix(".jsonl") for name in left if name.endswith(".jsonl")}
    assert MANIFEST not in left and "model.safetensors.index.json" not in left and 3 <= len(finished) < 6
    assert all(left[name] == (models / "out" / name).read_bytes() for name in shards)
    make_dead(store, "killed")
    times = {name: (store.bucket / "killed" / name).stat().st_mtime_ns for name in shards}
    elsewhere = tmp_path / "elsewhere"  # as on another machine: other paths, other times
    for name in ("sft", "dpo"):
        shutil.copytree(models / name, elsewhere / name, copy_function=shutil.copyfile)
    with serving(store.root) as server:
        use(server, monkeypatch)
        with pytest.raises(UsageError, match="--resume goes on"):
            extrapolate(models, "s3://bucket/killed")
        extrapolate(elsewhere, "s3://bucket/killed", resume=True)
    assert without_card(under(store, "killed")) == without_card(tree_bytes(models / "out"))
    kept = {name for name, then in times.items() if (store.bucket / "killed" / name).stat().st_mtime_ns == then}
    assert kept == finished


def test_a_finished_shard_that_changed_or_inputs_that_did(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow(tmp_path / "store", hold="model-00004") as store:
        killed(models, store, 3)
    make_dead(store, "killed")
    first = next((store.bucket / "killed").glob("model-00001-*"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    other = state(9, layers=8, hidden=64, vocabulary=500)
    write_folder(tmp_path / "sft", other)
    write_folder(tmp_path / "dpo", tuned(other, 2), shards=2)
    with serving(store.root) as server:
        use(server, monkeypatch)
        with pytest.raises(RunError, match="not those of the run that was stopped"):
            extrapolate(tmp_path, "s3://bucket/killed", resume=True)
        with pytest.raises(RunError, match="another plan"):
            extrapolate(models, "s3://bucket/killed", 0.4, resume=True)
        extrapolate(models, "s3://bucket/killed", resume=True)
    assert without_card(under(store, "killed")) == without_card(tree_bytes(models / "out"))


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
    output = "s3://bucket/other-byte"
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
    stopped_merge(models, "s3://bucket/global", monkeypatch, trim="global")
    shutil.copytree(models, tmp_path / "copy", ignore=shutil.ignore_patterns("out"))
    with pytest.raises(RunError, match=r"statistics over several tensors(?s:.*)rsync -a(?s:.*)dpo/model-"):
        merge(tmp_path / "copy", "s3://bucket/global", resume=True, trim="global")
    merge(models, "s3://bucket/global", resume=True, trim="global")
    assert MANIFEST in under(store, "global")


def test_servers_without_etags_are_held_to_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(remote, "_others_by_digest", lambda plan, journal, paths: asked.append(paths) or set())
    files = [
        SimpleNamespace(path=f"https://host/{name}", etag=etag)
        for name, etag in {"a": "x", "b": "", "c": "W/x"}.items()
    ]
    plan = SimpleNamespace(inputs=[SimpleNamespace(files=files)], jobs=[], outputs=[1])
    workspace = SimpleNamespace(place=parse_place("s3://b/o"), journal={}, settled={0}, changed_sources=set())
    remote._check_sources(cast(Any, plan), cast(Any, workspace))
    assert asked == [{"https://host/b", "https://host/c"}]


@pytest.mark.slow
@pytest.mark.parametrize("output", ["killed", "killed.safetensors"])
def test_kills_at_random_moments(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draws = random.Random(seed)
    extrapolate(models, str(tmp_path / output), threads=1)
    wanted = without_card(tree_bytes(tmp_path / output if output == "killed" else tmp_path))
    for number in range(8):
        root = tmp_path / f"store{number}"
        while draws.random() < 0.7:
            with slow(root) as store:
                before = partial(set_up, store.environment)
                with processes.started(models, *command(output), "--resume", before=before) as process:
                    time.sleep(draws.uniform(0.2, 2.5))
                    process.send(signal.SIGKILL)
                    process.end()
            left = without_card(under(store, "killed"))
            assert all(wanted[name] == content for name, content in left.items() if name in wanted)
            make_dead(store, output)
        with serving(root) as store:
            use(store, monkeypatch)
            extrapolate(models, f"s3://bucket/{output}", resume=True)
        assert without_card(under(store, "killed")) == wanted


def test_two_runs_at_once(server: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has the lock; a run that is silent for long loses it, and the other one keeps it."""
    use(server, monkeypatch)
    monkeypatch.setattr(remote_target, "RENEWED", 0.05)
    monkeypatch.setattr(remote_target, "DEAD", 1.5)
    folder = RemoteFolder(parse_place("s3://bucket/.locked.partial"))
    first = Lock(folder)
    with pytest.raises(RunError, match="another run"):
        Lock(folder)
    first._closed.set()  # as if it were killed
    first._thread.join()
    second = Lock(folder)
    first.close()
    assert (folder.get("lock") or b"").startswith(second._own)
    second.check()
    folder.put("lock", b"a third")
    until = time.monotonic() + 20
    while not second.lost:
        assert time.monotonic() < until
        time.sleep(0.02)
    with pytest.raises(RunError, match="another run"):
        second.check()
    second.close()
    assert folder.get("lock") == b"a third"
    folder.delete("lock")


def test_locks_of_stores_that_look_at_conditions(server: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One alone gets it, even where others saw the same dead run, or the dead run goes on."""
    monkeypatch.setattr(remote_target, "DEAD", 0.0)
    monkeypatch.setattr(remote_target, "SETTLED", 0.0)
    with spoiling(server, conditional=True) as (store, _):
        use(store, monkeypatch)
        folder = RemoteFolder(parse_place("s3://bucket/.looking.partial"))
        for content in (b"one", b"two"):
            folder.write_over("lock", content, None)
        dead = folder.look("lock")
        assert dead is not None and dead.content == b"one"
        live = Lock(folder)
        folder.write_over("lock", b"three", dead)
        assert live._is_own(folder.look("lock"))
        late = Lock.__new__(Lock)  # saw the dead run, and comes second
        vars(late).update(_folder=folder, _own=b"late", _signs=0, lost=False, _closed=live._closed)
        late._write(dead)
        assert live._is_own(folder.look("lock")) and not late._is_own(folder.look("lock"))
        before = folder.look("lock")
        live._write(before)
        after = folder.look("lock")
        assert live._is_own(after) and after != before
        live._write(before)  # as a run that was stopped between looking and writing
        assert folder.look("lock") == after
        live.close()
        assert folder.look("lock") is None


def test_a_spool_is_bounded(store: Store, tmp_path: Path) -> None:
    """Whoever is ahead of the upload waits; what is sent is given back."""
    spool, size, step = Spool(tmp_path), 40 << 20, 1 << 20
    done: list[Uploaded] = []
    sending = Upload(parse_place("s3://bucket/bounded"), spool, size, done.append, in_flight=2 * upload.PART)
    most = 0
    for begin in range(0, size, step):
        spool.write(begin, memoryview(bytes([begin // step]) * step))
        sending.made(Extent(begin, begin + step))
        sending.wait(4 * step)
        most = max(most, spool.nbytes)
    sending.complete()
    assert [each.size for each in done] == [size] and spool.nbytes == 0
    assert most <= 4 * step + upload.PART + step
    assert (store.bucket / "bounded").stat().st_size == size
    spool.close()


def test_bytes_that_changed_on_the_disk_are_not_sent(store: Store, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(0, memoryview(b"not what was made"))
    sending = Upload(parse_place("s3://bucket/changed"), spool, 17, lambda uploaded: None)
    sending.made(Extent(0, 17, "0" * 32))
    with pytest.raises(RunError, match="faulty"):
        sending.complete()
    assert not (store.bucket / "changed").exists()
    spool.close()


def test_nothing_is_published_of_nan(store: Store, tmp_path: Path) -> None:
    tensors = state(1)
    tensors["lm_head.weight"][0, 0] = torch.nan
    write_folder(tmp_path / "sft", state(1))
    write_folder(tmp_path / "dpo", tensors)
    for output in ("s3://bucket/nan.safetensors", "s3://bucket/nan"):
        with pytest.raises(mergekit_lite.NonFiniteError):
            extrapolate(tmp_path, output)
    left = under(store, "nan")
    assert "nan.safetensors" not in left and MANIFEST not in left
    extrapolate(tmp_path, "s3://bucket/nan", resume=True, allow_nonfinite=True)
    assert MANIFEST in under(store, "nan")


def test_no_secret_is_told(store: Store, models: Path, tmp_path: Path) -> None:
    """Neither on the screen nor in what is uploaded nor in what a stopped run leaves."""
    before = partial(set_up, {**store.environment, "AWS_SESSION_TOKEN": "", "TMPDIR": str(tmp_path)})
    command = ["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "s3://bucket/secrets"]
    told = [processes.run(models, *command, before=before), processes.run(models, *command, before=before)]
    assert [each.returncode for each in told] == [0, 2]
    wrong = partial(set_up, {**store.environment, "AWS_SECRET_ACCESS_KEY": SECRET[::-1]})
    told.append(processes.run(models, *command, "--force", "--json", before=wrong))
    assert told[-1].returncode == 1
    said = "".join(each.stdout + each.stderr for each in told).encode()
    written = [*store.objects().values(), *tree_bytes(tmp_path).values(), said]
    for secret in (KEY, SECRET, SECRET[::-1]):
        assert not any(secret.encode() in content for content in written)


def test_a_dry_run_tells_of_the_spool(store: Store, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mergekit_lite.commands import main

    with pytest.raises(SystemExit):
        command = ["extrapolate", str(models / "sft"), str(models / "dpo"), "--alpha", "0.3", "--dry-run", "--json"]
        main([*command, "-o", "s3://bucket/dry"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["outputs"] == ["s3://bucket/dry"] and 0 < plan["spool"] <= plan["bytes_to_write"]
    assert not under(store, "dry")


def test_vectors(store: Store, models: Path, tmp_path: Path) -> None:
    """Extracted, combined and applied into a store: the bytes are those of a disk."""
    base, tuned_model = models / "sft", models / "dpo"
    for kind, settings in {"dense": {}, "lora": {"rank": 2}}.items():
        name = "v.safetensors" if kind == "dense" else "lora"
        mergekit_lite.extract_vector(base, tuned_model, tmp_path / name, format=kind, **settings)
        extracted = mergekit_lite.extract_vector(base, tuned_model, f"s3://bucket/vec/{name}", format=kind, **settings)
        again = mergekit_lite.extract_vector(
            base, tuned_model, f"s3://bucket/vec/{name}", format=kind, resume=True, **settings
        )
        assert extracted.output == again.output == f"s3://bucket/vec/{name}" and again.nbytes == extracted.nbytes
    vector = str(tmp_path / "v.safetensors")
    for folder in (str(tmp_path), "s3://bucket/vec"):
        mergekit_lite.combine_vectors([vector], f"{folder}/sum.safetensors", "linear")
        mergekit_lite.apply_vectors(base, [vector], f"{folder}/applied.safetensors")
    assert under(store, "vec") == tree_bytes(tmp_path)
    with pytest.raises(UsageError, match="exists"):
        mergekit_lite.extract_vector(base, tuned_model, "s3://bucket/vec/v.safetensors")
    with pytest.raises(UsageError, match="given as text"):
        mergekit_lite.extract_vector(base, tuned_model, Path("s3://bucket/vec/w.safetensors"))
