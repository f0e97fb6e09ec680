"""Whole searches over synthetic candidates: what is chosen, what it costs, and that nothing is measured twice."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.boosting.candidates.candidate import ItemRow, Params
from mergekit_lite.boosting.search.choice import Result, Searcher, boost
from mergekit_lite.boosting.search.guards import Limits
from mergekit_lite.boosting.search.looks import looks
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import bracket, grid
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.boosting.summary import verdict
from mergekit_lite.errors import MergekitLiteError, UsageError
from tests.boost.synthetic import SyntheticEvaluator, measure


def peak(params: Params, at: float = 2.0, height: float = 0.6) -> float:
    """0 at alpha 0, ``height`` at ``at``, and soon worse than the baseline beyond it."""
    away = params["alpha"] / at - 1
    return height * (1 - away * away) if away < 0 else height * (1 - 4 * away * away)


def search(evaluator: SyntheticEvaluator, folder: Path, searcher: Searcher | None = None, **settings: Any) -> Result:
    """A whole search, by the bracket unless told otherwise."""
    with Study(folder, {"model": "synthetic"}, evaluator.items) as study:
        return boost(
            searcher or (lambda same: bracket(same=same)), evaluator, study, Settings(score="score", **settings)
        )


@pytest.mark.parametrize("at", [0.3, 2.0, 8.0])
def test_a_known_peak_is_found_and_confirmed(at: float, tmp_path: Path) -> None:
    result = search(SyntheticEvaluator(lambda params: peak(params, at)), tmp_path)
    assert result.chosen is not None and result.held_out is not None
    found = result.chosen["alpha"]
    assert peak({"alpha": found}, at) > 0.6 - 0.15, "within noise of the best, on the nearer side"
    assert found <= at * 1.25 + 0.1
    assert result.held_out.gain.above and result.held_out.gain.items == 200
    assert verdict(result)[0].startswith(f"alpha={found:g} beats alpha=0:")


def test_nothing_is_chosen_where_nothing_helps(tmp_path: Path) -> None:
    result = search(SyntheticEvaluator(lambda params: -params["alpha"]), tmp_path)
    assert result.chosen is None and result.picked is None
    assert verdict(result)[0] == "No candidate helps: none beats alpha=0 beyond its 95 % interval."


@pytest.mark.slow
def test_nothing_is_chosen_where_there_is_only_noise(tmp_path: Path) -> None:
    """Nine equal candidates: one of them looks better by chance in a fifth of the searches; held out it is not."""
    alphas = {"alpha": [0.1 * step for step in range(1, 10)]}
    wrong = looked_better = 0
    for trial in range(16):
        evaluator = SyntheticEvaluator(lambda params: 0.0, items=200, noise=2.0)
        evaluator.items = [f"{trial} {item}" for item in evaluator.items]
        result = search(evaluator, tmp_path / str(trial), lambda same: grid(alphas))
        wrong += result.chosen is not None
        looked_better += result.picked is not None
    assert wrong <= 1 < looked_better


@pytest.mark.slow
def test_a_plateau_gives_the_smallest_alpha(tmp_path: Path) -> None:
    """The first one on it, unless that is by chance more than a standard error below the best: a third of the cases."""
    chosen = []
    for trial in range(6):
        evaluator = SyntheticEvaluator(lambda params: min(params["alpha"], 1.0) if params["alpha"] < 20 else -5.0)
        evaluator.items = [f"{trial} {item}" for item in evaluator.items]
        result = search(evaluator, tmp_path / str(trial))
        assert result.chosen is not None
        chosen.append(result.chosen["alpha"])
    assert min(chosen) >= 1.0 and chosen.count(1.0) >= 3, chosen


@pytest.mark.slow
@pytest.mark.parametrize(("share", "most", "least"), [(0.5, 4.5, 30), (0.25, 5.5, 20)])
def test_holding_half_out_costs_less_and_finds_more(share: float, most: float, least: int, tmp_path: Path) -> None:
    """36 searches over 1,000 items whose best alpha gains 0.1, and 12 in which no alpha helps; see docs/boost.md."""
    passes, gains = [], []

    def found(name: str, curve: Callable[[Params], float]) -> float | None:
        evaluator = SyntheticEvaluator(curve, items=1000, noise=0.5 / math.sqrt(2))
        evaluator.items = [f"{name} {item}" for item in evaluator.items]
        result = search(evaluator, tmp_path / name, held_out=share)
        passes.append(len(evaluator.measured) / 1000)
        return None if result.chosen is None else curve(result.chosen)

    for trial in range(12):
        for at in (0.3, 2.0, 8.0):
            gains.append(found(f"{trial} {at}", lambda params, at=at: peak(params, at, height=0.1)))
    cost, sure = sum(passes) / 36, [gain for gain in gains if gain is not None and gain > 0]
    print(
        f"{share:g} held out: {cost:.1f} passes, {len(sure)} of 36 better, with a gain of {sum(sure) / len(sure):.3f}"
    )
    assert cost < most and len(sure) >= least and sum(sure) / len(sure) > 0.065
    assert [found(f"none {trial}", lambda params: -0.1 * params["alpha"]) for trial in range(12)] == [None] * 12


def test_a_bad_candidate_costs_an_eighth(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(lambda params: -9.0 * bool(params["alpha"]), items=800)
    result = search(evaluator, tmp_path)
    first = looks(400)[0]
    assert first == 50
    assert [point.gain.items for point in result.points] == [first] * len(result.points)
    assert all(point.dropped == "surely worse than alpha=0" for point in result.points)
    assert len(evaluator.measured) == 400 + first * len(result.points), "nothing is measured on what is held out"


def test_a_dropped_candidate_never_seems_better_than_what_it_lost_to(tmp_path: Path) -> None:
    """The first items are easy for every alpha but 0: the raw figure of a dropped one is higher than the best's."""
    evaluator = SyntheticEvaluator(lambda params: 0.0, items=400, noise=0.1)
    with Study(tmp_path, {"model": "synthetic"}, evaluator.items) as study:
        early = set(study.items[:80])
    plain = evaluator.row

    def row(params: Params, item: str) -> ItemRow:
        made = plain(params, item)
        value = made["values"]["score"] or 0.0
        lucky = 3.0 if item in early and params["alpha"] else 0.0
        made["values"]["score"] = value + lucky + {0: 0.0, 1: 1.0, 2: 0.5}[params["alpha"]]
        return made

    evaluator.row = row  # type: ignore[method-assign]
    told = []

    def watched(same: Any) -> Any:
        told.extend((yield [{"alpha": 1}]))
        told.extend((yield [{"alpha": 2}]))

    result = search(evaluator, tmp_path, watched, held_out=0)
    assert result.points[1].dropped == "surely worse than alpha=1"
    assert result.points[1].gain.mean > result.points[0].gain.mean
    assert told[1].score < told[0].score


def test_a_candidate_beyond_a_limit_is_out_however_high_its_score(tmp_path: Path) -> None:
    def words(params: Params, rng: Any) -> int:
        return rng.randint(5, 30) * (1 if params["alpha"] <= 1 else 4)

    evaluator = SyntheticEvaluator(lambda params: params["alpha"], words=words)
    result = search(evaluator, tmp_path)
    assert result.chosen is not None and result.chosen["alpha"] <= 1
    out = [point for point in result.points if point.params["alpha"] > 1]
    assert out and all(point.beyond and point.dropped.startswith("throughout growth") for point in out)
    assert any(said.startswith("Beyond limits: alpha=2 (growth") for said in verdict(result))


def test_another_scorer_may_not_lose_more_than_allowed(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(peak)
    result = search(evaluator, tmp_path, limits=Limits(loss={"other": 0.3}))
    assert result.chosen is None or peak(result.chosen) <= 0.3
    assert any("other loses" in said for point in result.points for said in point.beyond)


def test_a_win_that_is_only_length_is_said_to_be_so(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(
        lambda params: 0.0, noise=0.2, words=lambda n, rng: rng.randint(20, 60 + 30 * bool(n["alpha"]))
    )
    plain = evaluator.row

    def row(params: Params, item: str) -> ItemRow:
        made = plain(params, item)
        made["values"]["score"] = (made["values"]["score"] or 0.0) + 0.02 * len(made["text"])
        return made

    evaluator.row = row  # type: ignore[method-assign]
    result = search(evaluator, tmp_path, lambda same: grid({"alpha": [1.0]}))
    assert result.chosen == {"alpha": 1.0}
    assert any(said.startswith("This win may be only length") for said in verdict(result))


def test_few_items_are_all_searched_on_and_the_interval_is_corrected(tmp_path: Path) -> None:
    result = search(SyntheticEvaluator(peak, items=60), tmp_path)
    assert result.chosen is not None and result.held_out is None
    assert "corrected for" in verdict(result)[0]


def test_several_numbers_and_the_nearest_to_the_baseline(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(lambda params: min(params["a"] + params["b"], 1.0), noise=0.0)
    values = {"a": [0.0, 0.5, 1.0], "b": [0.0, 0.5, 1.0]}
    result = search(evaluator, tmp_path, lambda same: grid(values), baseline={"a": 0.0, "b": 0.0})
    assert result.chosen == {"a": 0.5, "b": 0.5}
    assert len(result.points) == 8, "the baseline is not measured again"


def test_several_answers_to_a_prompt_are_no_more_evidence_and_stay_together(tmp_path: Path) -> None:
    """Eight answers that are alike to each of forty prompts: the interval is that of forty, not of 320."""
    once, often = SyntheticEvaluator(peak, items=40), SyntheticEvaluator(peak, items=40)
    often.items = [f"{item}#{number}" for item in once.items for number in range(8)]
    plain = often.row
    often.row = lambda n, item: plain(n, item.partition("#")[0]) | ItemRow(item=item)  # type: ignore[method-assign]
    one, several = (
        search(evaluator, tmp_path / name, lambda same: grid({"alpha": [2.0]}))
        for name, evaluator in [("1", once), ("8", often)]
    )
    ours, theirs = several.points[0].gain, one.points[0].gain
    assert ours.items == theirs.items == 40
    assert ours[:3] == pytest.approx(theirs[:3], abs=0.01)
    with Study(tmp_path / "order", {}, often.items, seed=3) as study:
        assert [len({item.partition("#")[0] for item in group}) for group in study.clusters] == [1] * 40
        assert study.items != often.items and sorted(study.items) == sorted(often.items)


def test_the_scorer_must_be_there_and_give_verdicts(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(peak, items=40)
    with pytest.raises(UsageError, match=r"No scorer is called 'reward'; there are: score, other\."):
        search(evaluator, tmp_path / "a", limits=Limits(loss={"reward": 0.1}))
    evaluator.row = lambda params, item: ItemRow(item=item, values={"score": None})  # type: ignore[method-assign]
    with pytest.raises(MergekitLiteError, match="no verdict on any answer of alpha=0"):
        search(evaluator, tmp_path / "b")


def test_an_interrupted_search_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    whole = SyntheticEvaluator(peak)
    expected = search(whole, tmp_path / "whole")
    evaluator = SyntheticEvaluator(peak)
    stops = 0
    for limit in (7, 300, 301, 350, 777, 1200, None):
        evaluator.fail_after = limit
        try:
            result = search(evaluator, tmp_path / "stopped")
        except KeyboardInterrupt:
            stops += 1
    assert stops == 6
    assert len(set(evaluator.measured)) == len(evaluator.measured)
    assert sorted(evaluator.measured) == sorted(whole.measured)
    assert verdict(result) == verdict(expected) and result.picked is not None
    for name in ("alpha=0.jsonl", f"{result.picked.name}.jsonl", "alpha=0.5.partial.jsonl"):
        ours, theirs = (tmp_path / one / "candidates" / name for one in ("stopped", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.boost.search.test_choice import SyntheticEvaluator, peak, search
class Logged(SyntheticEvaluator):
    def row(self, numbers, item):
        made = super().row(numbers, item)
        with open(sys.argv[2], "a") as log:
            log.write(f"{numbers} {item}\\n")
        if len(self.measured) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return made
print(search(Logged(peak, items=200), Path(sys.argv[1])).chosen)
"""


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    """SIGKILL in the middle of a row: only that one row is made again."""
    log = tmp_path / "log"
    runs = [
        subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "study"), str(log), str(stop)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[3],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        )
        for stop in (30, 150, 0)
    ]
    assert [run.returncode for run in runs] == [-9, -9, 0], runs[-1].stderr
    lines = log.read_text().splitlines()
    assert len(lines) - len(set(lines)) == 2
    expected = search(SyntheticEvaluator(peak, items=200), tmp_path / "whole")
    assert runs[-1].stdout.strip() == str(expected.chosen)


def test_another_search_in_the_same_study_measures_only_what_is_new(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(peak)
    first = search(evaluator, tmp_path)
    before = len(evaluator.measured)
    known = [point.params["alpha"] for point in first.points if not point.dropped]
    again = search(evaluator, tmp_path, lambda same: grid({"alpha": known}))
    assert len(evaluator.measured) == before
    assert again.chosen == first.chosen


def test_a_study_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    with Study(tmp_path, {"model": {"sft": "x", "dpo": "y"}, "seed": 1}, ["a", "b"]):
        pass
    with pytest.raises(UsageError) as caught:
        Study(tmp_path, {"model": {"sft": "x", "dpo": "z"}, "rounding": "nearest"}, ["a", "b", "c"])
    message = str(caught.value)
    for part in ("model.dpo: y then, z now", "rounding: nothing then, nearest now", "seed: 1 then", "items.number: 2"):
        assert part in message
    assert "model.sft" not in message


def test_a_study_of_an_older_version_says_so(tmp_path: Path) -> None:
    with Study(tmp_path, {"scores": '[[], [{"name": "function"}]]'}, ["a"]):
        pass
    now = {"scores": '[[], [{"name": "function", "minimise": false}]]'}
    with pytest.raises(UsageError, match=r"begun by an older version, .* finish it with that version, give another -o"):
        Study(tmp_path, now, ["a"])


def test_a_study_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="found other files"):
        Study(tmp_path, {}, ["a"])


def test_two_searches_in_one_folder_are_refused(tmp_path: Path) -> None:
    with Study(tmp_path, {}, ["a"]), pytest.raises(UsageError, match="another search is at work"):
        Study(tmp_path, {}, ["a"])
    with Study(tmp_path, {}, ["a"]):
        pass


def test_names_that_no_file_can_have_are_told_apart(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(lambda params: 0.0, items=3)
    long = "models/0/parameters:weight" * 10
    with Study(tmp_path, {}, evaluator.items) as study:
        measure(evaluator, study, {f"{long}a": 1.0}, {f"{long}b": 1.0}, {"alpha": 1 / 3}, {"alpha": 0.333333})
    assert len(list((tmp_path / "candidates").glob("*.jsonl"))) == 4
    abouts = [json.loads(path.read_text()) for path in (tmp_path / "candidates").glob("*.json")]
    assert {"alpha": 1 / 3} in [about["numbers"] for about in abouts]
    assert all(math.isfinite(about["seconds"]) for about in abouts)
