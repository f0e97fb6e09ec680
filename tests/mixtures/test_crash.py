"""A mixture that was killed and resumed is the one that was never stopped; one whose inputs changed is refused."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import mergekit_lite
from mergekit_lite.mixtures.building import build_moe
from tests.mixtures.models import dense_model, write
from tests.models import tree_bytes
from tests.processes import run, started, wait_for_spans

RECIPE = """
base_model: a
gate_mode: hidden
experts:
- {source_model: a, positive_prompts: [one two three]}
- {source_model: b, positive_prompts: [user system], noise_scale: 0.01}
"""


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
        wait_for_spans(tmp_path, "out", 3)
        process.send(signal.SIGKILL)
        assert process.end().returncode == -signal.SIGKILL
    assert not Path("out").exists()
    resumed = run(tmp_path, *command, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert tree_bytes(Path("whole")) | {"README.md": b""} == tree_bytes(Path("out")) | {"README.md": b""}
    assert mergekit_lite.verify("out", samples="all").findings == ()
