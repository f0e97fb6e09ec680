"""The benchmark for GPUs runs, on a simulated one; without one it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, pinned_copies
from tests.engine import simulated_gpu
from tests.engine.simulated_gpu import SimulatedGpus


def measured(folder: Path, *recipes: str) -> tuple[dict[str, list[tuple[str, ...]]], list[str]]:
    files = [gpu.RECIPES / f"{name}.yml" for name in recipes]
    tables, wrong = gpu.measured(folder, "cuda:0", 8, 3, 1 << 14, files)
    return {table.title: list(map(tuple, table.rows)) for table in tables}, wrong


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpus:
    simulated = SimulatedGpus()
    simulated.install(monkeypatch)
    monkeypatch.setattr(pinned_copies, "BLOCK", 1 << 16)
    monkeypatch.setattr(gpu, "LAYERS", 1)
    return simulated


def test_it_runs(gpus: SimulatedGpus, tmp_path: Path) -> None:
    tables, wrong = measured(tmp_path, "slerp", "passthrough")
    assert not wrong
    compared, repeated, speed = tables.values()
    assert [row[:2] for row in compared[:2]] == [(name, "bfloat16") for name in ("slerp", "passthrough")]
    assert {row[2:] for row in compared} == {("none", "sound")}
    assert repeated[0][1] == "1 result of 3 runs"
    assert [row[0] for row in speed] == ["expo", "linear", "ties"]
    assert not gpus.faults


def test_it_says_what_is_wrong(gpus: SimulatedGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_gpu, "INEXACT", {"mul"})
    gpus.last_bits = 0.01
    wrong: list[str] = []
    recipe = gpu.RECIPES / "task_arithmetic.yml"
    list(gpu._compared(tmp_path, "cuda:0", 8, torch.bfloat16, [recipe], wrong))
    assert any("must not depend on the device" in what for what in wrong)


def test_it_refuses_without_a_gpu() -> None:
    ran = CliRunner().invoke(gpu.main, [])
    if not torch.cuda.is_available():
        assert ran.exit_code == 1
        assert ran.output.startswith("Error: Device 'cuda' is not there") and ran.output.count("\n") == 1
