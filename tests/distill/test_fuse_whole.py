"""FuseChat by the one command: tiny models of two tokenizers, killed on the way, from prompts to a report."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_lite.commands import main
from mergekit_lite.distillation.distilling import distill
from mergekit_lite.distillation.folder import Folder
from tests.distill.teaching_models import other_teacher
from tests.distill.training import STAGE, Printing, figures, log, same, target, weights
from tests.processes import Forked, preload

preload("mergekit_lite.distillation.training.fuse_trainer", "transformers.models.gpt2.modeling_gpt2")

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8}
FUSE = {**STAGE, "save_steps": 1, "trainer": {"use_cpu": True}}


def write(folder: Path, **train: Any) -> Path:
    """A target, a source and two teachers, and a recipe of them."""
    target(folder / "target")
    other_teacher(folder / "other")
    other_teacher(folder / "second", seed=4)
    for name, number in (("train", 12), ("held-out", 4)):
        rows = [json.dumps({"prompt": f"{name} question {index}"}) for index in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    recipe = {
        "folder": "made",
        "target": "./target",
        "prompts": [{"path": "train.jsonl"}],
        "sources": [{"name": "a", "model": "./other", "samples": 1, "sampling": SAMPLING, "device": "cpu"}],
        "scorers": [],
        "pairs": {"rule": "as_is", "cut": "keep"},  # models of random weights never end an answer
        "teachers": [
            {"name": name, "model": f"./{model}", "device": "cpu", "top": 16}
            for name, model in (("pivot", "target"), ("other", "other"), ("second", "second"))
        ],
        "train": train,
        "report": {"prompts": [{"path": "held-out.jsonl"}], "sampling": {**SAMPLING, "temperature": 0}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(path: str) -> None:
    """Distill by a recipe, on the CPU."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    distill(path, reporter=Printing())


def killed_once(path: Path, there: Path) -> str:
    """Run in a process, and kill it the moment a file or folder is there; what it had told."""
    with Forked(path.parent, run, str(path)) as process:
        while not there.exists():
            assert process.running, process.end()
            time.sleep(0.002)
        process.send(signal.SIGKILL)
        return process.end().stdout


def finished(path: Path) -> str:
    with Forked(path.parent, run, str(path)) as process:
        ended = process.end()
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


MOMENTS = (
    "train/fuse-other.partial/checkpoint-2/trainer_state.json",
    "teach/other/teacher.json",
    "train/fuse.partial/training.json",
)
TRAIN = {
    "sft": FUSE,
    "fuse": {**FUSE, "objective": "cross_entropy", "combine": "min_ce", "pairwise": {"merge_method": "varm"}},
}


def test_fusechat_by_one_command(tmp_path: Path) -> None:
    """Killed while a student learns, it goes on; done, it does nothing."""
    path = write(tmp_path, **TRAIN)
    made = tmp_path / "made"
    told = killed_once(path, made / MOMENTS[0])
    assert re.findall(r"^\[(\w+)\]$", told, re.MULTILINE) == ["sample", "score", "pair", "teach", "train"]
    told = finished(path)
    assert "sft: done" in told and "fuse-other: goes on after step" in told
    assert not list(made.glob("train/*.partial"))
    report = json.loads((made / "report" / "report.json").read_text())
    assert set(report["held_out"]["models"]) == {"untrained", "sft", "fuse"}
    assert set(report["training"]) == {"sft", "fuse-other", "fuse-second"}
    pictures = {path.name for path in (made / "report").glob("*.png")}
    assert pictures == {"held-out.png", "sft.png", "fuse-other.png", "fuse-second.png"}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_model(tmp_path: Path) -> None:
    """Killed while teachers teach, a student learns and students are merged."""
    paths = {name: write(tmp_path / name, **TRAIN) for name in ("whole", "killed")}
    finished(paths["whole"])
    made, broken = (path.parent / "made" for path in paths.values())
    for moment in (MOMENTS[1], MOMENTS[0], MOMENTS[2]):
        killed_once(paths["killed"], broken / moment)
    finished(paths["killed"])
    for stage in ("sft", "fuse-other", "fuse-second", "fuse"):
        same(weights(made / "train" / stage), weights(broken / "train" / stage))
        if stage != "fuse":
            assert figures(made / "train" / stage) == figures(broken / "train" / stage)
    files = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    finished(paths["whole"])
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == files


def shortened(folder: Path, **changes: Any) -> Path:
    """The recipe without what makes rows, with changes."""
    path = write(folder)
    recipe = yaml.safe_load(path.read_text())
    for key in ("prompts", "sources", "pairs", "scorers", "report"):
        del recipe[key]
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def test_given_rows_and_the_models_own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are given, one student of all teachers, then its own answers: no source is asked."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    words = ("one", "four", "five", "helpful")
    rows = [{"prompt": f"{word}?", "completion": f"{word} two three"} for word in words]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {**FUSE, "sampling": {"max_tokens": 4}, "max_length": 64}
    train = {"fuse": {**FUSE, "objective": "alm"}, "on_policy": own}
    path = shortened(tmp_path, rows={"sft": [{"path": "rows.jsonl"}]}, train=train)
    dry = CliRunner().invoke(main, ["distill", "run", str(path), "--dry-run", "--json"], catch_exceptions=False)
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.output)["training"] == [
        {"stage": "fuse", "rows": 4, "steps": 1},
        {"stage": "on_policy", "rows": 4, "steps": 1},
    ]
    result = CliRunner().invoke(main, ["distill", "run", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    folder = Folder(tmp_path / "made")
    (row,) = log(folder.trained("fuse"))
    assert {"distance/pivot", "distance/other", "distance/second", "clm", "grouped"} <= row.keys()
    assert 0.5 < row["grouped"] <= 1.0
    started = json.loads((folder.trained("on_policy") / "training.json").read_text())["settings"]["start"]
    assert started == str(folder.trained("fuse"))
    assert set(json.loads((folder.report / "report.json").read_text())["training"]) == {"fuse", "on_policy"}


def test_the_models_own_answers_alone_need_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    own = {**FUSE, "sampling": {"max_tokens": 4}, "max_length": 64}
    pivot = {"name": "pivot", "model": "./target", "device": "cpu"}
    changes = {"prompts": [{"path": "train.jsonl", "limit": 4}], "teachers": [pivot], "train": {"on_policy": own}}
    path = shortened(tmp_path, **changes)
    result = CliRunner().invoke(main, ["distill", "run", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "made" / "train" / "on_policy" / "config.json").exists()
    assert not (tmp_path / "made" / "teach").exists()
