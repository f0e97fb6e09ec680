"""Memory of all processes of a run together: little for each tensor, however many there are."""

from __future__ import annotations

import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

import mergekit_lite
from mergekit_lite.engine.schedule import Schedule
from mergekit_lite.engine.tensor_merge import JobMerge
from mergekit_lite.engine.tiling import Span
from tests.models import state, tuned, write_folder, write_many

FEW, MORE, MANY = 1_000, 8_000, 100_000
GROUPED = 400
EXTRAPOLATE = ("extrapolate", "base", "a", "--alpha", "0.3")
MERGE = ("merge", "recipe.yml")
TIES = """
merge_method: ties
base_model: base
models: [{model: a}, {model: b}]
parameters: {density: 0.5, weight: 0.5, trim: %s}
"""


def peak(folder: Path, tensors: int, command: Sequence[str] = EXTRAPOLATE, trim: str = "tensor") -> int:
    """Return the most bytes that a run with three workers holds: shared memory is counted once."""
    folder.mkdir()
    for seed, name in enumerate(("base", "a", "b")):
        write_many(folder / name, tensors, seed)
    (folder / "recipe.yml").write_text(TIES % trim)
    most = 0
    program = [sys.executable, "-m", "mergekit_lite", *command, "-o", "out", "--threads", "3", "-q"]
    with subprocess.Popen(program, cwd=folder) as run:
        while run.poll() is None:
            most = max(most, sum(map(held, [run.pid, *children(run.pid)])))
            time.sleep(0.03)
    assert run.returncode == 0
    return most


def children(process: int) -> list[int]:
    with suppress(OSError):
        return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    return []


def held(process: int) -> int:
    """Return a process's share of the memory it holds, in bytes; 0 where it has ended."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return 0


def test_little_for_each_tensor(tmp_path: Path) -> None:
    few, more = (peak(tmp_path / str(tensors), tensors) for tensors in (FEW, MORE))
    assert few < 60e6, few
    assert (more - few) / (MORE - FEW) < 3_000, (few, more)


def test_counts_over_a_group_of_tensors_are_added_as_they_come(tmp_path: Path) -> None:
    """Those of one tensor take a megabyte."""
    assert peak(tmp_path / "grouped", GROUPED, MERGE, trim="global") < 170e6


@pytest.mark.slow
@pytest.mark.parametrize("command", [EXTRAPOLATE, MERGE], ids=["two models", "three models"])
def test_a_hundred_thousand_tensors(tmp_path: Path, command: Sequence[str]) -> None:
    assert peak(tmp_path / "many", MANY, command) < 250e6


def test_a_task_keeps_the_sums_of_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method was sent for a tensor takes megabytes, and a task has hundreds of small tensors."""
    base = state(0)
    for seed, name in enumerate(("base", "a", "b")):
        write_folder(tmp_path / name, tuned(base, seed) if seed else base)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in ("a", "b")]
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": models}
    made: list[weakref.ref[JobMerge]] = []
    at_once: list[int] = []
    merge_of = Schedule._merge

    def counting(self: Schedule, span: Span, output: int) -> JobMerge:
        at_once.append(1 + sum(each() is not None for each in made))
        merge = merge_of(self, span, output)
        made.append(weakref.ref(merge))
        return merge

    monkeypatch.setattr(Schedule, "_merge", counting)
    monkeypatch.setattr("mergekit_lite.engine.tiling.TASKS", 1)  # all tensors in one task
    mergekit_lite.merge(recipe, tmp_path / "merged", threads=1)
    assert len(made) > 5 and max(at_once) <= 2, "the one before goes when the next is there"
