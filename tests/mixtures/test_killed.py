"""Mixtures that are made when the process is killed: nothing bears the output's name, and --resume ends the same."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.mixtures.tiny import made
from tests.models import tree_bytes
from tests.processes import run, started, wait_for_spans

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 1024}
COMMANDS = {
    "upcycle": ("upcycle", "llama", "--experts", "6", "--noise", "0.01"),
    "split": ("moe", "split", "mixtral", "--experts", "0,1,2"),
    "merge-experts": ("moe", "merge-experts", "mixtral", "--to", "3", "--by", "weights"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_run_resumes_to_the_same_bytes(command: str, tmp_path: Path) -> None:
    arguments = COMMANDS[command]
    kind = "llama" if command == "upcycle" else "mixtral"
    made(kind, tmp_path / kind, torch.bfloat16, **WIDE)
    whole = run(tmp_path, *arguments, "-o", "whole")
    assert whole.returncode == 0, whole.stderr
    with started(tmp_path, *arguments, "-o", "out", "--threads", "1") as process:
        wait_for_spans(tmp_path, "out", 2)
        process.send(signal.SIGKILL)
        assert process.end().returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    refused = run(tmp_path, *arguments, "-o", "out")
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    resumed = run(tmp_path, *arguments, "-o", "out", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    names = ("README.md",)  # the card names the output
    before, after = (
        {name: data for name, data in tree_bytes(tmp_path / out).items() if name not in names}
        for out in ("whole", "out")
    )
    assert before == after
