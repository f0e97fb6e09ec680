"""Candidates measured by several processes: the same rows as by one, and no process that outlives the search."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergekit_lite.boosting.boosting import search_and_write
from mergekit_lite.boosting.description import described
from mergekit_lite.boosting.request import prepare
from mergekit_lite.engine import devices
from mergekit_lite.errors import MergekitLiteError, RunError, UsageError
from tests.boost.end_to_end import write_models, write_prompts
from tests.boost.test_boost import ROOT, request_of, rows_of
from tests.waiting import is_gone

MORTAL = "function:tests.boost.end_to_end:mortal"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    write_prompts(root)
    return root


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As many threads in this process as in each worker, so that sums are the same to the last bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PROCESSES", str(tmp_path / "processes"))


def test_two_processes_measure_what_one_does_and_one_that_is_killed_is_replaced(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"search": "grid", "grid": {"alpha": (1.0, 4.0)}, "batch_size": 4, "seed": 3}
    request = request_of(models, tmp_path / "one", MORTAL, "log_ratio", prompts=(models / "prompts.jsonl",), **grid)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = search_and_write(prepare(request))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("DIES", str(tmp_path / "died"))
    said: list[str] = []
    prepared = prepare(replace(request, output=tmp_path / "two", parallel=2))
    assert "2 processes with 1 thread and a model each: 2 × 0.00 GB" in described(prepared)["measured by"]
    two = search_and_write(prepared, note=said.append)
    assert len(said) == 1 and "was ended by SIGKILL" in said[0] and "Another one takes its place" in said[0]
    assert rows_of(tmp_path / "two.boost") == rows_of(tmp_path / "one.boost")
    assert [point.gain for point in two.result.points] == [point.gain for point in one.result.points]
    assert two.result.points[0].facts["effective"] == one.result.points[0].facts["effective"]
    processes = {int(line) for line in (tmp_path / "processes").read_text().split()} - {os.getpid()}
    assert len(processes) == 3 and all(map(is_gone, processes))


@pytest.mark.slow
def test_what_a_worker_raises_is_raised_here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function's own traceback; workers that die one after the other; a scorer that can't be opened."""
    usual = {"prompts": (models / "prompts.jsonl",), "parallel": 2}
    request = request_of(models, tmp_path / "a", "function:tests.boost.end_to_end:broken", **usual)
    with pytest.raises(RunError, match=r"(?s)raised an error on its first answers.*1 / 0 for _ in.*ZeroDivisionError"):
        search_and_write(prepare(request))
    request = request_of(models, tmp_path / "b", "function:tests.boost.end_to_end:nothing", **usual)
    with pytest.raises(MergekitLiteError, match="nothing"):
        search_and_write(prepare(request))
    monkeypatch.setenv("DIES", "always")
    said: list[str] = []
    with pytest.raises(RunError, match=r"was ended by SIGKILL.* fewer --parallel need less, and so did the one before"):
        search_and_write(prepare(request_of(models, tmp_path / "c", MORTAL, **usual)), note=said.append)
    assert 1 <= len(said) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_search_that_is_ended_leaves_no_process_and_goes_on(
    models: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """SIGINT reaches all, as from a terminal; the others only the command."""
    arguments = [
        "boost", "sft", "dpo", "--prompts", "prompts.jsonl", "--score", MORTAL, "--search", "grid", "--grid", "0.5,2",
        "--max-tokens", "6", "--batch-size", "4", "--parallel", "2", "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SECONDS": "0.3"}
    log = tmp_path / "processes"
    command = [sys.executable, "-m", "mergekit_lite", *arguments]
    running = subprocess.Popen(
        command, cwd=models, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while running.poll() is None and (not log.exists() or len(set(log.read_text().split())) < 2):
        time.sleep(0.05)
    (os.killpg if how == signal.SIGINT else os.kill)(running.pid, how)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == {signal.SIGINT: 1, signal.SIGTERM: 143, signal.SIGKILL: -9}[how], said
    assert "Traceback" not in said
    processes = {int(line) for line in log.read_text().split()}
    assert len(processes) == 2 and all(map(is_gone, processes))
    kept = sum(len(rows) for rows in rows_of(tmp_path / "out.boost").values())
    assert kept < 24 * 3
    again = subprocess.run(command, cwd=models, env=environment | {"SECONDS": "0"}, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert rows_of(tmp_path / "out.boost").keys() == {"alpha=0", "alpha=0.5", "alpha=2"}


def test_every_gpu_has_a_process_unless_one_is_named(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)

    def found(device: str, **options: object) -> tuple[str, ...]:
        request = request_of(models, tmp_path / "out", "log_ratio", prompts=(models / "prompts.jsonl",))
        return prepare(replace(request, device=device, **options)).devices  # type: ignore[arg-type]

    monkeypatch.setattr("mergekit_lite.engine.devices.memory_left", lambda device: 10**9)
    assert found("cuda") == found("auto") == found("cuda:all") == ("cuda:0", "cuda:1", "cuda:2")
    assert found("cuda:1") == ("cuda:1",)
    assert found("cuda", parallel=2) == ("cuda:0", "cuda:1")
    assert found("cuda:1", parallel=2) == ("cuda:1", "cuda:1")
    assert found("cpu") == ("cpu",) and found("cpu", parallel=2) == ("cpu", "cpu")
    monkeypatch.setattr("mergekit_lite.engine.devices.memory_left", lambda device: 10**5)
    with pytest.raises(UsageError, match=r"2 models take 2 × .* free on cpu: lower --parallel"):
        found("cpu", parallel=2)
    assert found("cuda") == ("cuda:0", "cuda:1", "cuda:2"), "one on each GPU, as it would be alone"
