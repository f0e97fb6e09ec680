"""Two processes train as one does: with the whole model in each, or in shares (FSDP2)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mergekit_lite.distillation.teaching.files import TaughtFile
from tests.distill.launching import ROOT, Two
from tests.distill.teaching_models import other_teacher, said

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """What accelerate launch makes of the page's file, for two processes in float32."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    (text,) = re.findall(r"```yaml\n(# fsdp\.yaml\n.*?)```", PAGE, re.DOTALL)
    text = text.replace("num_processes: 8 ", "num_processes: 2 ").replace(
        "mixed_precision: bf16", "mixed_precision: 'no'"
    )
    (tmp_path / "fsdp.yaml").write_text(text)
    given = launch.launch_command_parser().parse_args(["--config_file", str(tmp_path / "fsdp.yaml"), "-m", "x"])
    arguments, _, _ = launch._validate_launch_command(given)
    assert (arguments.num_processes, arguments.use_fsdp, arguments.mixed_precision) == (2, True, "no")
    made = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in made.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def test_two_processes_are_as_good_as_one(tmp_path):
    two = Two(tmp_path, sft={}, preference={})
    two.launch({})
    for name, processes in {"one": 1, "two": 2}.items():
        for stage in ("sft", "preference"):
            record = json.loads((tmp_path / name / "train" / stage / "training.json").read_text())
            assert record["processes"] == processes
    two.check_alike()


def judged(folder: Path) -> None:
    """Every other SFT row has a judgment."""
    path = folder / "pairs" / "sft.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | ({"judgment": "one is helpful"} if number % 2 else {}) for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_two_processes_judge_and_doubt_as_one_does(tmp_path):
    """CUT, then SPA with the confidences of both processes, another model as reference and its logits mixed in."""
    options = {"window": 8, "quantile": 0.5, "smoothing": 0.4, "beta": 2.0, "mix": 2.0}
    preference = {"objective": "spa", "options": options, "reference": str(tmp_path / "target"), "eval": 4}
    two = Two(tmp_path, judged, sft={"unlikelihood": {}}, preference=preference)
    two.launch({})
    two.check_alike()


def taught(folder: Path) -> None:
    """What the target and a model of other tokens say of a folder's rows."""
    for name, model in (("pivot", "target"), ("other", "other")):
        settings = {"teacher": name, "vocabulary": 340, "top": 16}
        with TaughtFile.with_settings(folder / "teach" / name, settings) as file:
            file.append(said(folder.parent / model, folder / "pairs" / "sft.jsonl", 16))


@pytest.mark.parametrize("shares", [False, True])
def test_two_processes_fuse_as_one_does(tmp_path, sharded, shares):
    other_teacher(tmp_path / "other")
    teachers = [
        {"name": "pivot", "model": str(tmp_path / "target")},
        {"name": "other", "model": str(tmp_path / "other")},
    ]
    fuse = {"objective": "cross_entropy", "combine": "min_ce", "clm": 0.5, "eval": 3, "eval_steps": 2}
    two = Two(tmp_path, taught, fuse=fuse, teachers=teachers)
    two.launch(sharded if shares else {})
    two.check_alike()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("efficient", ["true", "false"])
def test_two_processes_by_fsdp2_are_as_good_as_one(tmp_path, sharded, efficient, lora):
    """Also where both are killed in between."""
    more = {"per_device_batch_size": 1, "save_steps": 2, "eval": 3} | ({"lora": {"rank": 4}} if lora else {})
    two = Two(tmp_path, sft={"epochs": 1, **more}, preference={"batch_size": 8, **more})
    sharded |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": efficient}
    two.launch(sharded, until="preference.partial/checkpoint-2/trainer_state.json")
    assert "preference: goes on after step 2" in two.launch(sharded)
    two.check_alike()
