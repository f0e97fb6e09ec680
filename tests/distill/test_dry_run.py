"""What a dry run tells and a run refuses before anybody is asked; what on-policy teachers will have to score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_lite.answers.rows import write_rows
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.commands import main
from mergekit_lite.distillation.dry_run import LOG_PROB, dry_run, unfilled
from mergekit_lite.distillation.prompts import read
from mergekit_lite.distillation.reporter import Reporter
from tests.answers.fake_server import Fake, fake_server
from tests.distill import on_policy
from tests.distill.recipes import recipe, write_recipe

TRAIN = {
    "sft": {"learning_rate": 1e-5, "batch_size": 5},
    "preference": {"learning_rate": 1e-6, "batch_size": 4, "objective": "dpo", "epochs": 2},
}


def asked(folder: Path, number: int) -> None:
    write_rows(folder / "prompts.jsonl", ({"prompt": f"question {n}"} for n in range(number)))
    (folder / "target").mkdir(exist_ok=True)


def invoke(*given: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["distill", "run", *map(str, given)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("number", "share", "stages"),
    [(10, 0.5, {}), (9, 0.5, {"sft"}), (3, 0.5, {"sft"}), (2, 0.5, {"sft", "preference"}), (9, 1.0, {"preference"})],
)
def test_rows_that_fill_no_batch(tmp_path: Path, number: int, share: float, stages: set[str]) -> None:
    """Of n prompts ⌊share·n⌋ are for SFT, a batch of 5; the others for pairs, twice, in batches of 4."""
    asked(tmp_path, number)
    with fake_server(Fake()) as fake:
        source = {"name": "a", "model": "m", "server": fake.url}
        pairs = {"rule": "best_worst", "score": "right", "sft_share": share}
        path = write_recipe(tmp_path, train=TRAIN, pairs=pairs, sources=[source])
        code, told, warned = invoke(path, "--dry-run", "--json")
        plan = {each["stage"]: each for each in json.loads(told)["training"]}
        assert code == 0 and {name for name, each in plan.items() if "problem" in each} == {*stages}
        assert all((each["steps"] == 0) == ("problem" in each) for each in plan.values())
        code, told, warned = invoke(path, "--dry-run")
        assert code == 0 and warned.count("this run will be refused: train.") == len(stages)
        if stages:
            code, told, warned = invoke(path)
            assert code == 2 and "There will be too few rows to train on" in warned
            assert all(f"train.{name}: " in warned for name in stages)
            assert not fake.bodies and not (tmp_path / "out").exists(), "before anybody is asked"


def test_what_to_do(tmp_path: Path) -> None:
    asked(tmp_path, 9)
    made = recipe(tmp_path, train=TRAIN, pairs={"rule": "best_worst", "score": "right", "sft_share": 0.5})
    [told] = unfilled(made, read(made, Reporter(), plan=True))
    assert told == "train.sft: 1 epochs of at most 4 rows don't fill a batch of 5. Set batch_size to 4 at most."
    trained = made.folder / "train" / "sft"
    trained.mkdir(parents=True)
    (trained / "config.json").write_text("{}")
    assert unfilled(made, read(made, Reporter(), plan=True)) == [], "what is done is done"


def test_each_round_has_to_fill_its_batches(tmp_path: Path) -> None:
    """Of nine prompts the rounds have 5 and 4; the second one trains on rows of the first again, or doesn't."""
    asked(tmp_path, 9)
    train = {"preference": {"learning_rate": 1e-6, "batch_size": 5, "objective": "dpo"}}
    pairs = {"rule": "best_worst", "score": "right", "sft_share": 0}
    for replay, expected in (([0.5], []), ([], ["round 2: train.preference: 1 epochs of at most 4 rows"])):
        rounds = {"number": 2, "replay": replay}
        made = recipe(tmp_path, train=train, pairs=pairs, rounds=rounds)
        prompts = read(made, Reporter(), plan=True)
        found = unfilled(made, prompts)
        assert len(found) == len(expected) and all(a.startswith(b) for a, b in zip(found, expected, strict=True))
        assert [each.problem for each in dry_run(made, prompts).training if each.problem] == found


def test_what_on_policy_teachers_score(tmp_path: Path) -> None:
    """Three rounds of 4 of 6 prompts, two answers each; one teacher teaches a domain of three prompts."""
    teachers = [on_policy.teacher(tmp_path / "all"), on_policy.teacher(tmp_path / "half", domains=("a",))]
    made = on_policy.recipe(tmp_path, teachers, rounds=3)
    plan = dry_run(made, read(made, Reporter(), plan=True))
    assert [(each.name, each.of, each.rows) for each in plan.teachers] == [
        ("all", "own answers", 3 * 4 * 2), ("half", "own answers", 3 * 3 * 2),
    ]  # fmt: skip
    weights = sum(spec.numel for spec in open_checkpoint(tmp_path / "all").tensors.values())
    for each in plan.teachers:  # answers have no more than 12 tokens
        assert each.exaflops == pytest.approx(each.rows * 12 * 2 * weights / 1e18, rel=1e-12)
        assert each.bytes == each.rows * 12 * LOG_PROB
