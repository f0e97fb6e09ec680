"""Outputs in object stores that workers of a cluster make: the bytes of a disk's, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import state, tree_bytes, tuned, write_folder
from tests.remote.object_store import Store, serving

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
            yield pickle.loads(pickle.dumps(do(pickle.loads(pickle.dumps(task)))))

for function, arguments, options in json.loads(sys.argv[1]):
    getattr(ml, function)(*arguments, **options, ray=Packing())
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with serving(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    sft = state(1, layers=8, hidden=64, vocabulary=500)
    write_folder(place / "sft", sft)
    write_folder(place / "dpo", tuned(sft, 2), shards=2)
    return place


def python(place: Path, store: Store, code: str, *arguments: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=place,
        env=os.environ | store.environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr


PLAIN = (
    "import json, sys; import mergekit_lite as ml\n"
    "for function, arguments, options in json.loads(sys.argv[1]): getattr(ml, function)(*arguments, **options)"
)


def test_what_workers_make_is_what_a_disk_has(models: Path, store: Store) -> None:
    """Several files are sent by workers, one by the command; of several outputs, too."""
    jobs = [
        ("extrapolate", ("sft", "dpo", "{}/several-{{alpha}}", [0.3, 0.5]), {"shard_size": 50_000}),
        ("extrapolate", ("sft", "dpo", "{}/one", 0.3), {}),
        ("extrapolate", ("sft", "dpo", "{}/torch-{{alpha}}.pt", [0.3, 0.5]), {}),
        ("extract_vector", ("sft", "dpo", "{}/vector.safetensors"), {"format": "lowrank", "rank": 2}),
    ]
    for code, place in ((PLAIN, "plain"), (PACKING, "s3://bucket")):
        named = [
            (function, [one.format(place) if isinstance(one, str) else one for one in arguments], options)
            for function, arguments, options in jobs
        ]
        python(models, store, code, json.dumps(named))
    made, wanted = store.objects(), tree_bytes(models / "plain")
    assert made.keys() == wanted.keys()
    cards = {name for name in wanted if name.endswith("README.md")}
    assert [name for name in wanted if made[name] != wanted[name] and name not in cards] == []
