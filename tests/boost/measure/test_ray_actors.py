"""Candidates measured on the machines of a Ray cluster: the rows of one process, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from mergekit_lite.boosting.boosting import search_and_write
from mergekit_lite.boosting.description import described
from mergekit_lite.boosting.request import Request, prepare
from mergekit_lite.errors import UsageError
from tests.answers.aggregating.aggregates import reply
from tests.answers.fake_server import Fake, fake_server
from tests.boost.end_to_end import write_models, write_prompts
from tests.boost.test_boost import ROOT, SHORT, request_of, rows_of
from tests.ray_nodes import RayNodes, end_group, processes_in, wait_for

MORTAL = "function:tests.boost.end_to_end:mortal"
ARGUMENTS = (
    "--prompts", "prompts.jsonl", "--score", MORTAL, "--search", "grid", "--grid", "1,4",
    "--temperature", "1", "--top-p", "1", "--max-tokens", "6", "--batch-size", "4", "--limits", "growth=none", "-q",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    write_prompts(root)
    return root


@pytest.fixture(scope="module")
def rows(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The rows of one process with one thread; the scorer notes its process, and waits where it runs elsewhere."""
    root, before = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROCESSES", str(root / "processes"))
        search_and_write(prepare(whole(models, root / "out")))
        torch.set_num_threads(before)
        patch.setenv("SECONDS", "0.3")
        yield rows_of(root / "out.boost")


def whole(models: Path, output: Path) -> Request:
    """What the arguments ask for."""
    grid = {"search": "grid", "grid": {"alpha": (1.0, 4.0)}, "batch_size": 4, "sampling": SHORT}
    return request_of(models, output, MORTAL, prompts=(models / "prompts.jsonl",), **grid)


def started(models: Path, output: Path, address: str) -> subprocess.Popen[str]:
    """The command on a cluster, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mergekit_lite", "boost", str(models / "sft"), str(models / "dpo"), *ARGUMENTS,
         "-o", str(output), "--ray", address],
        cwd=models, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def measured_by(process: subprocess.Popen[str], log: Path, workers: int) -> None:
    """Wait until so many processes have measured something."""
    wait_for(lambda: process.poll() is not None or (log.exists() and len(set(log.read_text().split())) >= workers))
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_an_opponent_and_candidates_on_a_cluster(models: Path, tmp_path: Path, place_of_ray: Path) -> None:
    """An opponent's own model answers there, a server's here; answers and rows are those of one process."""
    layers = [{"step": "generate", "model": ["served", "own"]}, {"step": "fuse", "model": ["served"]}]
    function = "function:tests.boost.test_opponent:seen"
    with fake_server(Fake(reply=reply)) as fake:
        asked = [
            {"name": "served", "model": "SERVED", "server": fake.url, "sampling": {"max_tokens": 64}},
            {"name": "own", "model": str(models / "sft"), "sampling": {"max_tokens": 6}},
        ]
        recipe = {"models": asked, "layers": layers, "name": "moa"}
        (tmp_path / "moa.yml").write_text(yaml.safe_dump(recipe))
        for output, ray in (("here", ()), ("there", ("--ray", "local:2"))):
            ended = subprocess.run(
                [sys.executable, "-m", "mergekit_lite", "boost", "sft", "dpo", *ARGUMENTS[:2], *ARGUMENTS[4:],
                 "--score", function, "--opponent", tmp_path / "moa.yml", "-o", tmp_path / output, *ray],
                cwd=models, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True,
                text=True, timeout=900, check=False,
            )  # fmt: skip
            assert ended.returncode == 0, ended.stderr
    for name in ("answers.jsonl", "answers.steps.jsonl"):
        here, there = (sorted((tmp_path / f"{each}.boost" / "opponent" / name).read_text().splitlines())
                       for each in ("here", "there"))  # fmt: skip
        assert here == there and here
    assert rows_of(tmp_path / "here.boost") == rows_of(tmp_path / "there.boost")
    assert processes_in(place_of_ray) == set()


@pytest.mark.slow
def test_workers_and_machines_that_die(
    models: Path, rows: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies is replaced; where its machine dies, the others do its work."""
    monkeypatch.setenv("PROCESSES", str(tmp_path / "processes"))
    monkeypatch.setenv("DIES", str(tmp_path / "died"))
    with RayNodes(3) as nodes:
        process = started(models, tmp_path / "out", nodes.address)
        try:
            measured_by(process, tmp_path / "processes", 3)
            nodes.kill()
            nodes.add()
            err = process.communicate(timeout=900)[1]
        finally:
            end_group(process)
    assert process.returncode == 0, err
    assert rows_of(tmp_path / "out.boost") == rows
    assert (tmp_path / "died").exists()
    lost = [line for line in err.splitlines() if "ended early. Another one takes its place." in line]
    assert len(lost) == len(err.splitlines()) - 1 >= 2, err  # and the models' large delta


@pytest.mark.slow
def test_interrupted(
    models: Path, rows: object, tmp_path: Path, place_of_ray: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C nothing runs on; what was measured is kept, and this process goes on with it."""
    monkeypatch.setenv("PROCESSES", str(tmp_path / "processes"))
    process = started(models, tmp_path / "out", "local:2")
    try:
        measured_by(process, tmp_path / "processes", 2)
        wait_for(lambda: any(file.stat().st_size for file in (tmp_path / "out.boost").glob("candidates/*")))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=600)
        assert process.returncode == 1, err
        assert "Traceback" not in err
        wait_for(lambda: not processes_in(place_of_ray))
    finally:
        end_group(process)
    assert 0 < sum(map(len, rows_of(tmp_path / "out.boost").values())) < 72
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    search_and_write(prepare(whole(models, tmp_path / "out")))
    torch.set_num_threads(before)
    assert rows_of(tmp_path / "out.boost") == rows


def test_what_can_not_be_asked(models: Path, tmp_path: Path) -> None:
    request = whole(models, tmp_path / "out")
    words = described(prepare(replace(request, ray="local:2", parallel=1)))["measured by"]
    assert (
        words
        == "a worker for each processor of the Ray cluster local:2, 1 at most, each with a model: 0.00 GB of weights"
    )
    for changes, told in (
        ({"ray": "somewhere"}, "HOST:PORT"),
        ({"ray": "auto", "device": "cuda:1"}, "all GPUs"),
        ({"ray": "auto", "serve_command": "serve {model} {port}"}, "needs --parallel N, or --device cuda"),
    ):
        with pytest.raises(UsageError, match=told):
            prepare(replace(request, **changes))  # type: ignore[arg-type]
