"""Systems that lack what Linux has: the same bytes without it, and consoles that can't show every character."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest

from mergekit_lite.file_names import unfit_on_windows
from tests.elsewhere import jobs
from tests.models import state, tree_bytes, tuned, write_folder

ROOT = Path(__file__).parents[1]
TIES = """merge_method: ties
base_model: sft
models:
  - {model: dpo, parameters: {weight: 1.0, density: 0.5}}
  - {model: other, parameters: {weight: 0.5, density: 0.4}}
dtype: bfloat16
"""


def elsewhere(place: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """A Python that knows as little of its system as on Windows."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "elsewhere"), str(ROOT)])}
    return subprocess.Popen([sys.executable, *arguments], cwd=place, env={**os.environ, **paths, **environment})


def make_inputs(place: Path) -> None:
    base = state(1, layers=3, hidden=64)
    for seed, name in enumerate(("sft", "dpo", "other"), 1):
        write_folder(place / name, base if name == "sft" else tuned(base, seed), shards=2)
    (place / "ties.yml").write_text(TIES)


def test_the_main_jobs_give_the_same_bytes(tmp_path: Path) -> None:
    """Killed on the way and resumed, by a Python without the calls of POSIX, and by this one without a stop."""
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        place.mkdir()
        make_inputs(place)
    killed = elsewhere(there, "-m", "tests.elsewhere.jobs", "FIRST", SLOW="0.05")
    journal, until = there / ".resumed.partial" / "journal.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        assert time.monotonic() < until and killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert (there / "rows.partial.jsonl").exists() and not (there / "resumed").exists()
    assert elsewhere(there, "-m", "tests.elsewhere.jobs", "REST").wait() == 0
    with chdir(here):
        jobs.first()
        jobs.rest()
    assert tree_bytes(there) == tree_bytes(here)


def on_console(place: Path, encoding: str, *arguments: str) -> str:
    """What a command shows on a terminal of an encoding."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    command = [sys.executable, "-m", "mergekit_lite", *arguments]
    process = subprocess.Popen(command, cwd=place, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "cp437"])
def test_a_console_that_lacks_characters(tmp_path: Path, encoding: str) -> None:
    """Bars, arrows and Greek letters are shown as well as it can; nothing fails."""
    make_inputs(tmp_path)
    shown = on_console(tmp_path, encoding, "extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "αβ→out")
    assert "alphabeta->out" in shown or "αbeta->out" in shown  # cp437 has an alpha of its own
    assert (tmp_path / "αβ→out" / "model.safetensors.index.json").exists()
    formula = on_console(tmp_path, encoding, "methods", "slerp")
    assert "theta" in formula or "Θ" in formula or "θ" in formula


@pytest.mark.parametrize("name", ["CON", "nul.pt", "Lpt1.safetensors", "a:b", "a\\b", "what?", "end.", "end "])
def test_names_that_windows_lacks(name: str) -> None:
    assert unfit_on_windows(name) is not None


@pytest.mark.parametrize("name", ["model", "v1.2.safetensors", "console", "com0x", "αβ→out"])
def test_names_that_windows_has(name: str) -> None:
    assert unfit_on_windows(name) is None
