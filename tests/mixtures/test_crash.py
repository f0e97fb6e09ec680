"""A mixture that was killed and resumed is the one that was never stopped; one whose inputs changed is refused."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

import mergekit_lite
from mergekit_lite.mixtures.building.building import build_moe
from tests.mixtures.models import dense_model, write
from tests.models import tree_bytes
from tests.processes import run, started

RECIPE = """
base_model: a
gate_mode: hidden
experts:
- {source_model: a, positive_prompts: [one two three]}
- {source_model: b, positive_prompts: [user system], noise_scale: 0.01}
"""
WAIT = 300  # seconds: the model has to run first


@pytest.mark.slow
def test_a_kill_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are computed once more, to the same bits."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        write(dense_model("llama", seed, intermediate_size=120_000), Path(name), "llama-3")
    Path("r.yml").write_text(RECIPE)
    build_moe("r.yml", "whole", threads=1)
    command = ("moe", "r.yml", "-o", "out", "--threads", "1")
    with started(tmp_path, *command) as process:
        journal, until = Path(".out.partial/journal.jsonl"), time.monotonic() + WAIT
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
            assert process.running and time.monotonic() < until, "the run journals nothing"
            time.sleep(0.001)
        process.send(signal.SIGKILL)
        assert process.end().returncode == -signal.SIGKILL
    assert not Path("out").exists()
    resumed = run(tmp_path, *command, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert tree_bytes(Path("whole")) | {"README.md": b""} == tree_bytes(Path("out")) | {"README.md": b""}
    assert mergekit_lite.verify("out", samples="all").findings == ()
