"""Outputs in object stores that workers of a cluster make: the bytes of a disk's, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mergekit_lite.errors import RunError
from mergekit_lite.object_stores import Place
from mergekit_lite.output import remote_workspace, upload
from mergekit_lite.output.remote_target import RemoteFolder
from tests.models import state, tree_bytes, tuned, write_folder
from tests.ray_nodes import RayNodes, end_group, wait_for
from tests.remote.object_store import Proxy, spoiling
from tests.remote.outputs import extrapolate, use
from tests.stores.object_stores import BUCKET, Store, serving

MERGE = ("merge", "ties.yml", "--shard-size", "20000", "-o")
TIES = """
merge_method: ties
base_model: {0}sft
models: [{{model: {0}dpo, parameters: {{density: 0.4, weight: 0.5}}}}]
parameters: {{trim: global}}
"""

PACKING = """
import json, os, pickle, sys
import mergekit_lite as ml
from ray import cloudpickle

class Packing:
    'Workers in this process, who get everything as they would elsewhere; the last task first.'
    local, nodes = False, {}
    seen = None

    def must_see(self, files, marks=()):
        from mergekit_lite.engine.ray_machine import Needs, _missing, identity
        for wrong in ("", "x"):
            told = _missing(Needs(identity(), tuple(files), tuple((path, text + wrong) for path, text in marks)))
            assert bool(told) == (bool(wrong) and bool(marks)), told

    def run(self, tasks, worker, size=None):
        do = cloudpickle.loads(cloudpickle.dumps(worker))()
        for task in reversed(tasks):
            given = pickle.loads(pickle.dumps(task))
            do.expect(given)
            yield pickle.loads(pickle.dumps(do(given)))

for function, arguments, options in json.loads(sys.argv[1]):
    getattr(ml, function)(*arguments, **options, ray=Packing())
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    sft = state(1, layers=8, hidden=64, vocabulary=500)
    write_folder(place / "sft", sft)
    write_folder(place / "dpo", tuned(sft, 2), shards=2)
    return place


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Store]:
    root = tmp_path_factory.mktemp("store")
    for name in ("sft", "dpo"):
        shutil.copytree(models / name, root / BUCKET / "in" / name)
    with serving(root) as store:
        yield store


DOCUMENTS = """
merge_method: linear
models: [{model: half, parameters: {weight: 0.5}}, {model: sft, parameters: {weight: 0.5}}]
---
name: half
merge_method: linear
models: [{model: sft, parameters: {weight: 0.5}}, {model: dpo, parameters: {weight: 0.5}}]
"""


def python(place: Path, store: Store, code: str, *arguments: str) -> str:
    """Run code to its end, and return what it says."""
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=place,
        env=os.environ | store.environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


PLAIN = (
    "import json, sys; import mergekit_lite as ml\n"
    "for function, arguments, options in json.loads(sys.argv[1]): getattr(ml, function)(*arguments, **options)"
)


def test_what_workers_make_is_what_a_disk_has(models: Path, store: Store) -> None:
    """Several files are sent by workers, one by the command; of several outputs and documents, too."""
    (models / "documents.yml").write_text(DOCUMENTS)
    jobs = [
        ("extrapolate", ("sft", "dpo", "{}/several-{{alpha}}", [0.3, 0.5]), {"shard_size": 50_000}),
        ("extrapolate", ("sft", "dpo", "{}/one", 0.3), {}),
        ("extrapolate", ("sft", "dpo", "{}/torch-{{alpha}}.pt", [0.3, 0.5]), {}),
        ("merge", ("documents.yml", "{}/fused"), {"shard_size": 50_000}),
        ("merge", ("documents.yml", "{}/kept"), {"shard_size": 50_000, "keep": True}),
        ("extract_vector", ("sft", "dpo", "{}/vector.safetensors"), {"format": "lowrank", "rank": 2}),
    ]
    for code, place in ((PLAIN, "plain"), (PACKING, "s3://bucket")):
        named = [
            (function, [one.format(place) if isinstance(one, str) else one for one in arguments], options)
            for function, arguments, options in jobs
        ]
        python(models, store, code, json.dumps(named))
    made = {name: content for name, content in store.objects().items() if not name.startswith("in/")}
    wanted = tree_bytes(models / "plain")
    between = {name: wanted.pop(name) for name in [*wanted] if name.startswith(".kept.documents/")}
    assert tree_bytes(models / ".kept.documents") == {
        name.removeprefix(".kept.documents/"): content for name, content in between.items()
    }
    assert made.keys() == wanted.keys()
    cards = {name for name in wanted if name.endswith("README.md")}
    assert [name for name in wanted if made[name] != wanted[name] and name not in cards] == []


COUNTED = """
from mergekit_lite.checkpoint.stores.ranges import TRAFFIC
from mergekit_lite.checkpoint.stores.read_ahead import BlockReader

BlockReader.__init__.__defaults__ = (100_000, 2)  # bytes of room: less than a file has, more than a tensor
ml.merge("counted.yml", "plain/read")
TRAFFIC.taken()
for ray in (None, Packing()):
    ml.merge("counted.yml", "s3://bucket/read", shard_size=200_000, force=True, ray=ray)
    print(TRAFFIC.taken().nbytes)
"""


def test_workers_read_no_more_than_a_plain_run(models: Path, store: Store) -> None:
    """A tensor whose statistics are gathered first is fetched once where there is room for it."""
    recipe = TIES.format("s3://bucket/in/").replace("trim: global", "trim: tensor")
    (models / "counted.yml").write_text(recipe)
    plain, by_workers = map(int, python(models, store, PACKING.rpartition("\nfor function")[0] + COUNTED).split())
    print(plain, by_workers)
    assert by_workers <= 1.05 * plain


def test_a_file_with_another_tag_is_read(
    models: Path, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker that counted as dead may send its file once more: the same bytes are fine, and no others."""
    use(store, monkeypatch)
    monkeypatch.setattr(upload, "tag", lambda etag: "another")
    extrapolate(models, str(tmp_path / "again"))
    extrapolate(models, "s3://bucket/again")
    assert weights(store.objects(), "again") == weights(tree_bytes(tmp_path / "again"))
    standing = remote_workspace.standing
    for byte in (10, -1):  # of the header, of a tensor

        def meddled(output: Place, byte: int = byte) -> dict[str, int]:
            there = standing(output)
            if shards := sorted(name for name in there if name.startswith("model-")):
                content = bytearray(RemoteFolder(output).get(shards[1]) or b"")
                content[byte] ^= 1
                RemoteFolder(output).put(shards[1], bytes(content))
            return there

        with monkeypatch.context() as patch:
            patch.setattr(remote_workspace, "standing", meddled)
            with pytest.raises(RunError, match=r"another run wrote there meanwhile(?s:.*)model-00002"):
                extrapolate(models, "s3://bucket/again", force=True)


@pytest.fixture(scope="module")
def slow_store(store: Store) -> Iterator[tuple[Store, Proxy]]:
    """The store behind a line on which each upload of bytes takes a while."""
    with spoiling(store, delay=0.3) as (slow, proxy):
        yield slow, proxy


@pytest.fixture(scope="module")
def nodes(slow_store: tuple[Store, Proxy], models: Path) -> Iterator[RayNodes]:
    (models / "ties.yml").write_text(TIES.format("./"))
    (models / "elsewhere.yml").write_text(TIES.format("s3://bucket/in/"))
    command(models, slow_store[0], *MERGE, "ties")
    with RayNodes(3, **slow_store[0].environment) as cluster:
        yield cluster


def command(
    place: Path, store: Store, *arguments: str, expected: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    ended = subprocess.run(
        [sys.executable, "-m", "mergekit_lite", *arguments],
        cwd=place,
        env=os.environ | store.environment | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == expected, ended.stderr
    return ended


def journals(store: Store, output: str) -> int:
    """Return how many files of an output are finished."""
    return len(list((store.bucket / f".{output}.partial").glob("*.jsonl")))


@contextmanager
def under_way(
    place: Path, store: Store, output: str, *more: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Give a merge into the store once it has finished some more files; it ends with the context."""
    before = journals(store, output)
    process = subprocess.Popen(
        [sys.executable, "-m", "mergekit_lite", *MERGE, f"s3://bucket/{output}", "--json", *more],
        cwd=place,
        env=os.environ | store.environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: process.poll() is not None or journals(store, output) > before + 1)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        end_group(process)
        process.communicate()


def make_dead(store: Store, output: str) -> None:
    """Let the lock that a killed run left look as old as it would be some minutes later."""
    lock = store.bucket / f".{output}.partial/lock"
    if lock.exists():
        long_ago = time.time() - 1000
        os.utime(lock, (long_ago, long_ago))


def weights(objects: dict[str, bytes], prefix: str = "") -> dict[str, bytes]:
    """Return the weights, index and manifest of an output."""
    return {
        name.removeprefix(f"{prefix}/"): content
        for name, content in objects.items()
        if name.startswith(f"{prefix}/model" if prefix else "model")
    }


@pytest.mark.slow
def test_models_and_outputs_on_either_side(nodes: RayNodes, models: Path, slow_store: tuple[Store, Proxy]) -> None:
    store, wanted = slow_store[0], weights(tree_bytes(models / "ties"))
    assert len(wanted) > 8
    for recipe, output in (
        ("ties.yml", "s3://bucket/over"),
        ("elsewhere.yml", "s3://bucket/both"),
        ("elsewhere.yml", str(models / "here")),
    ):
        told = command(models, store, "merge", recipe, *MERGE[2:], output, "--ray", nodes.address, "--json")
        assert len([node for node in json.loads(told.stdout)["nodes"] if node["tasks"]]) == 3
        made = tree_bytes(models / "here") if output.endswith("here") else store.objects()
        assert weights(made, output.partition("bucket/")[2]) == wanted, output
    command(models, store, "verify", "s3://bucket/over", "--ray", nodes.address)
    assert not [name for name in store.objects() if "probe" in name or name.startswith((".over", ".both"))]


@pytest.mark.slow
def test_a_node_killed(nodes: RayNodes, models: Path, slow_store: tuple[Store, Proxy]) -> None:
    """The files that a dead node had begun are made by others."""
    store = slow_store[0]
    with under_way(models, store, "killed", "--ray", nodes.address) as process:
        nodes.kill()
        out, err = process.communicate(timeout=600)
    nodes.add()
    assert process.returncode == 0, err
    assert weights(store.objects(), "killed") == weights(tree_bytes(models / "ties"))
    assert sum(node["workers_lost"] for node in json.loads(out)["nodes"]) == 1


@pytest.mark.slow
def test_the_driver_killed(nodes: RayNodes, models: Path, slow_store: tuple[Store, Proxy], tmp_path: Path) -> None:
    """A run goes on from another machine, which has nothing of it: on the cluster again, after that without one."""
    store = slow_store[0]
    for number, more in enumerate(((), ("--resume",))):
        (empty := tmp_path / str(number)).mkdir()
        with under_way(models, store, "driver", "--ray", nodes.address, *more, TMPDIR=str(empty)) as process:
            process.kill()
        make_dead(store, "driver")
    kept = {name for name in store.objects() if name.startswith("driver/model")}
    assert kept
    (empty := tmp_path / "last").mkdir()
    command(models, store, *MERGE, "s3://bucket/driver", "--resume", TMPDIR=str(empty))
    assert weights(store.objects(), "driver") == weights(tree_bytes(models / "ties"))


@pytest.mark.slow
def test_a_machine_that_knows_another_store(
    nodes: RayNodes, models: Path, slow_store: tuple[Store, Proxy], tmp_path: Path
) -> None:
    """Where a machine's environment names another store it gets no work, and its name is told."""
    with serving(tmp_path) as other:
        told = command(models, other, *MERGE, "s3://bucket/other", "--ray", nodes.address, expected=1)
    assert "no machine of the cluster can do this work" in told.stderr
    assert told.stderr.count("sees another s3://bucket") == 3
    assert not list(slow_store[0].bucket.glob(".other*"))
