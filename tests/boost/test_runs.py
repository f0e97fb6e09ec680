"""Boosts of a training run: how far to follow it is chosen by measuring, as alpha is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from mergekit_lite import extrapolate_run
from mergekit_lite.boosting.candidates.family import RunFamily
from mergekit_lite.boosting.candidates.tunable import parse
from mergekit_lite.boosting.search.search import bracket
from mergekit_lite.commands import main
from mergekit_lite.engine.run import run
from tests.boost.end_to_end import write_pairs
from tests.boost.synthetic import alphas, tried
from tests.causal import causal_model
from tests.models import read_folder, same_bytes, tree_bytes
from tests.tokenizers import tokenizer

STEPS = (25, 75)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two checkpoints of a run that began with it, all of bfloat16."""
    root = tmp_path_factory.mktemp("run")
    model = causal_model("llama").to(torch.bfloat16)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    for name, step in {"base": 0, **{f"run/step-{step}": step for step in STEPS}}.items():
        ways, noise = torch.Generator().manual_seed(3), torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter, first in zip(model.parameters(), start, strict=True):
                away = torch.randn(first.shape, generator=ways) * step * 1e-4
                parameter.copy_(first + away + torch.randn(first.shape, generator=noise) * 5e-4 * (step > 0))
        model.save_pretrained(root / name)
        tokenizer("chatml").save_pretrained(root / name)
    write_pairs(root)
    return root


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["boost", *map(str, arguments), "--score", "pairs", "--pairs", "pairs.jsonl"])


def test_the_chosen_model_is_the_one_that_extrapolate_makes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    out = tmp_path / "out"
    said = command("base", "run/step-*", "--tune", "to_step=75:2500", "-o", out, "--json")
    assert said.exit_code == 0, said.stderr
    told = json.loads(said.stdout)
    assert told["baseline"]["numbers"] == {"to_step": 75}
    asked = [each["numbers"]["to_step"] for each in told["candidates"]]
    assert asked[:4] == [112.5, 150, 225, 375]  # where a pair has 0.5, 1, 2, 4
    assert told["chosen"] and told["chosen"]["to_step"] > 75
    made = tree_bytes(out)
    extrapolate_run("base", "run", out, told["chosen"]["to_step"], force=True)
    assert made == tree_bytes(out)


def test_the_baseline_is_the_last_checkpoint_to_the_bit(models: Path, tmp_path: Path) -> None:
    """In whatever order the checkpoints come, and whatever is left out of the extrapolation."""
    checkpoints = [str(models / f"run/step-{step}") for step in reversed(STEPS)]
    tunables = parse(["to_step=75:300"])
    family = RunFamily(str(models / "base"), checkpoints, [75, 25], tunables, {"exclude": ["norm"]})
    run(family.plan(family.baseline, tmp_path / "last"))
    last, made = read_folder(models / "run/step-75"), read_folder(tmp_path / "last")
    assert made.keys() == last.keys() and all(same_bytes(made[name], last[name]) for name in last)
    run(family.plan({"to_step": 300}, tmp_path / "on"))
    base, on = read_folder(models / "base"), read_folder(tmp_path / "on")
    assert all(same_bytes(on[name], base[name]) == ("norm" in name) for name in base)


def test_a_runs_bracket_is_a_pairs_in_other_units() -> None:
    def score(alpha: float) -> float:
        return -abs(alpha - 2.7)

    of_run = tried(bracket("to_step", origin=75, unit=75), lambda params: score(params["to_step"] / 75 - 1))
    assert [params["to_step"] for params in of_run] == pytest.approx(
        [75 * (1 + alpha) for alpha in alphas(bracket(), score)]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["base", "run/step-25", "run/step-75"], "with --tune to_step=LOW:HIGH"),
        (["base", "--tune", "to_step=75:90"], "Name the base and the checkpoints of a run"),
        (["base", "run", "--tune", "to_step=10:20"], "20 is not beyond the baseline, 75"),
        (["base", "run", "--tune", "to_step=75:90", "--tune", "alpha=0:1"], "'alpha': a run has one to_step"),
        (["base", "run", "--tune", "to_step[filter=mlp]=75:90"], "merge_method: relex"),
        (["base", "run", "--tune", "to_step=75:90", "--new-rows", "copy"], "--new-rows: of a pair, not of a run"),
        (["base", "run/step-25", "run/step-75", "--steps", "3", "--tune", "to_step=1:9"], "a step for each of the 2"),
        (["base", "run/step-75", "--steps", "25"], "--steps are those of a run's checkpoints"),
        (["base", "run", "--tune", "to_step=75:90", "--score", "log_ratio"], "--score log_ratio is for a pair"),
    ],
)
def test_what_is_no_run_is_refused(
    arguments: list[str], said: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    ran = command(*arguments, "-o", tmp_path / "out")
    assert ran.exit_code == 2 and said in ran.stderr, ran.stderr
    assert not list(tmp_path.iterdir())
