"""Optuna as a search: it finds, goes on, and keeps what a dashboard shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from mergekit_lite.boosting.candidates.candidate import Params
from mergekit_lite.boosting.candidates.ranges import Range, read_range
from mergekit_lite.boosting.search.choice import boost
from mergekit_lite.boosting.search.optuna_search import optuna_search
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import SearchOutcome
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.errors import UsageError
from tests.boost.synthetic import SyntheticEvaluator, tried

RANGES = {"a": Range(0.0, 2.0, 0.01), "b": Range(-1.0, 1.0, 0.01)}
SETTINGS = Settings(score="score", baseline={"a": 0.0, "b": 0.0})


def bowl(params: Params) -> float:
    """Best at a = 1.2, b = 0.4, and 0 at the baseline."""
    return 1.6 - (params["a"] - 1.2) ** 2 - (params["b"] - 0.4) ** 2


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_a_bowls_floor_is_found(sampler: str, tmp_path: Path) -> None:
    search = optuna_search(RANGES, SETTINGS, storage=f"sqlite:///{tmp_path}/study.db", sampler=sampler, trials=25)
    asked = tried(search, bowl)
    assert len(asked) == 25
    assert all(0 <= one["a"] <= 2 and -1 <= one["b"] <= 1 for one in asked)
    assert max(map(bowl, asked)) > 1.4


def test_what_was_tried_comes_first_and_counts(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    first = tried(optuna_search(RANGES, SETTINGS, storage=storage, trials=6), bowl)
    search = optuna_search(RANGES, SETTINGS, storage=storage, trials=9)
    again = list(next(search))
    assert again == first
    again += search.send([SearchOutcome(bowl(params)) for params in again])
    search.close()  # killed in the seventh
    resumed = tried(optuna_search(RANGES, SETTINGS, storage=storage, trials=9), bowl)
    assert resumed[:7] == again and len(resumed) == 9
    assert len({str(one) for one in resumed}) == 9, "nothing is drawn twice because the sampler began anew"


def test_the_attributes_hold_what_a_dashboard_shows(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    evaluator = SyntheticEvaluator(bowl, items=160, words=lambda params, rng: 20 if params["a"] < 1.5 else 200)
    with Study(tmp_path / "kept", {}, evaluator.items) as study:
        boost(lambda same: optuna_search(RANGES, SETTINGS, storage=storage, trials=12), evaluator, study, SETTINGS)
    [name] = optuna.get_all_study_names(storage)
    baseline, *trials = optuna.load_study(study_name=name, storage=storage).trials
    assert baseline.user_attrs == {"baseline": True} and baseline.value == 0
    assert len(trials) == 12
    for trial in trials:
        shown = trial.user_attrs
        assert set(shown) == {"score", "allowed", "gain", "beyond", "dropped", "guards", "others", "facts"}
        assert shown["guards"]["growth"] > 0 and shown["gain"]["items"] > 0
        assert (shown["beyond"] != []) == (not shown["allowed"]) == (trial.params["a"] >= 1.5)
        assert (trial.state.name == "PRUNED") == (shown["dropped"] != "")
        page = shown["gain"]["mean"]
        assert trial.value == page or (trial.state.name == "COMPLETE" and not shown["allowed"])
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}


def test_a_candidate_out_of_limits_is_told_as_no_better_than_the_worst(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    outcomes = iter(
        [
            SearchOutcome(0.5),
            SearchOutcome(-0.3),
            SearchOutcome(9.0, allowed=False),
            SearchOutcome(float("nan"), allowed=False),
        ]
    )
    tried(optuna_search(RANGES, SETTINGS, storage=storage, trials=4), lambda params: next(outcomes))
    [name] = optuna.get_all_study_names(storage)
    told = [trial.value for trial in optuna.load_study(study_name=name, storage=storage).trials]
    assert told == [0.0, 0.5, -0.3, -0.3, -0.3]


def test_other_settings_are_another_study_in_the_same_database(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    tried(optuna_search(RANGES, SETTINGS, storage=storage, trials=2), bowl)
    narrow = {**RANGES, "a": Range(0.5, 1.0, 0.1)}
    asked = tried(optuna_search(narrow, SETTINGS, storage=storage, trials=2), bowl)
    assert all(0.5 <= one["a"] <= 1 for one in asked), "the baseline lies outside and is left out"
    assert len(optuna.get_all_study_names(storage)) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from mergekit_lite.boosting.search.choice import boost
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.boosting.search.optuna_search import optuna_search
from tests.boost.search.test_trials import RANGES, SETTINGS, SyntheticEvaluator, bowl
folder, log, stop = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
class Logged(SyntheticEvaluator):
    def row(self, numbers, item):
        with open(log, "a") as file:
            file.write(f"{numbers} {item}\\n")
        if len(self.measured) == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().row(numbers, item)
bench = Logged(bowl, items=150)
with Study(folder, {}, bench.items) as study:
    search = lambda same: optuna_search(RANGES, SETTINGS, storage=f"sqlite:///{folder}/study.db", trials=6)
    boost(search, bench, study, SETTINGS)
"""


def test_a_killed_process_measures_nothing_twice(tmp_path: Path) -> None:
    """But for the one row each at which it was killed."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "study"), str(tmp_path / "log")]
    root = Path(__file__).parents[3]
    runs = [
        subprocess.run(
            [*command, str(stop)], capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
        )
        for stop in (250, 0)
    ]
    assert [run.returncode for run in runs] == [-9, 0], runs[-1].stderr
    storage = f"sqlite:///{tmp_path}/study/study.db"
    [name] = optuna.get_all_study_names(storage)
    states = [trial.state.name for trial in optuna.load_study(study_name=name, storage=storage).trials]
    assert states.count("FAIL") == 1, "the one that was running came again"
    assert states.count("COMPLETE") + states.count("PRUNED") == 7, "the baseline and six"
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) - len(set(lines)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1.5", Range(0, 1.5, 0.01)),
        ("0:1", Range(0, 1, 0.01)),
        ("0:32", Range(0, 32, 0.1)),
        ("-1:1:0.25", Range(-1, 1, 0.25)),
        ("0:1:0.3", Range(0, 0.9, 0.3)),
    ],
)
def test_ranges_are_read(text: str, expected: Range) -> None:
    found = read_range(text)
    assert (found.low, found.high, found.step) == pytest.approx((expected.low, expected.high, expected.step))


@pytest.mark.parametrize("text", ["", "1", "1:0", "0:1:2", "0:1:0", "0:1:-1", "a:b", "0:inf", "nan:1", "0:1:0.1:3"])
def test_ranges_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected LOW:HIGH"):
        read_range(text)


@pytest.mark.parametrize(
    ("sampler", "ranges", "storage", "said"),
    [
        ("cmaes", {"a": RANGES["a"]}, "sqlite:///{}/study.db", "two numbers or more"),
        ("random", RANGES, "sqlite:///{}/study.db", "there are: tpe, cmaes"),
        ("tpe", RANGES, "sqlite:///{}/none/study.db", "can't open this database"),
        ("tpe", RANGES, "nothing", "can't open this database"),
        ("tpe", RANGES, "postgresql://nobody@localhost:1/none", "can't open this database"),
    ],
)
def test_what_can_not_be_searched_with_is_told_at_once(
    sampler: str, ranges: dict[str, Range], storage: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        optuna_search(ranges, SETTINGS, storage=storage.format(tmp_path), sampler=sampler)
