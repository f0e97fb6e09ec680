"""Candidates measured side by side: the result is that of one worker, whoever is first and whoever dies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.boosting.candidates.candidate import Job, Params, Piece, label, pieces
from mergekit_lite.boosting.search.choice import Result, Searcher, boost
from mergekit_lite.boosting.search.measuring import Demand, Measuring
from mergekit_lite.boosting.search.optuna_search import optuna_search
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import bracket, grid
from mergekit_lite.boosting.search.study import Study
from tests.boost.search.test_choice import peak
from tests.boost.search.test_trials import RANGES, bowl
from tests.boost.synthetic import SyntheticEvaluator, measure


class Shuffled:
    """Workers that are as fast as chance has it, and sometimes die."""

    def __init__(self, evaluator: SyntheticEvaluator, size: int, seed: int, deaths: float = 0.0):
        self.evaluator, self.size, self.deaths = evaluator, size, deaths
        self.rng = random.Random(seed)
        self.items: list[str] = []  # in the study's order
        self.at_work: dict[int, Iterator[Piece]] = {}
        self.most = 0  # candidates at the same time
        self.candidates: dict[int, str] = {}
        self.lost = 0

    @property
    def workers(self) -> list[int]:
        """All that work, and some of the others: for one that died there may be no place for a while."""
        idle = [worker for worker in range(self.size) if worker not in self.at_work]
        some = [worker for worker in idle if not self.deaths or self.rng.random() > self.deaths]
        return sorted({*self.at_work, *(some if some or self.at_work else idle)})

    def give(self, worker: int, job: Job) -> None:
        assert worker not in self.at_work and job.wanted
        self.at_work[worker], self.candidates[worker] = pieces(self.evaluator, self.items, job), label(job.params)
        self.most = max(self.most, len({self.candidates[busy] for busy in self.at_work}))

    def next(self) -> tuple[int, Piece]:
        worker = self.rng.choice(sorted(self.at_work))
        if self.rng.random() < self.deaths:
            del self.at_work[worker]
            self.lost += 1
            return worker, Piece(ended=True, lost=True)
        piece = next(self.at_work[worker])
        if piece.ended:
            del self.at_work[worker]
        return worker, piece


def search(
    folder: Path, searcher: Searcher, evaluator: SyntheticEvaluator, team: Shuffled | None = None, **settings: Any
) -> Result:
    with Study(folder, {"model": "synthetic"}, evaluator.items) as study:
        if team is not None:
            team.items = study.items
        return boost(searcher, evaluator, study, Settings(score="score", **settings), team=team)


def compared(result: Result) -> Any:
    """All of a result but the time it took."""
    return [repr(point).partition(", facts=")[0] for point in (result.baseline, *result.points)], (
        result.chosen, result.held_out and result.held_out.gain, result.stays,
    )  # fmt: skip


SEARCHES: dict[str, Searcher] = {
    "grid": lambda same: grid({"alpha": [0.5, 1.0, 8.0, 2.0, 4.0, 1.5, 3.0, 2.5]}),
    "bracket": lambda same: bracket(same=same),
}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(("size", "deaths"), [(2, 0.0), (5, 0.0), (3, 0.01)])
def test_the_result_is_that_of_one_worker(name: str, size: int, deaths: float, tmp_path: Path) -> None:
    """Also which candidates were dropped, at which look and against which."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    noisy = {"noise": 1.5, "items": 320}
    alone = search(tmp_path / "alone", SEARCHES[name], SyntheticEvaluator(peak, **noisy))
    assert {bool(point.dropped) for point in alone.points} == {True, False}
    evaluator = SyntheticEvaluator(peak, **noisy)
    team = Shuffled(evaluator, size, seed, deaths)
    together = search(tmp_path / "together", SEARCHES[name], evaluator, team)
    assert compared(together) == compared(alone)
    assert (team.lost > 0) == bool(deaths)
    assert deaths or max(Counter(evaluator.measured).values()) == 1, "no row is measured twice"
    assert team.most > 1 or name == "bracket"
    files = [path.name for path in (tmp_path / "alone" / "candidates").glob("*.jsonl") if "partial" not in path.name]
    for file in files:
        one, several = ((tmp_path / each / "candidates" / file).read_bytes() for each in ("alone", "together"))
        assert one == several


def test_what_was_measured_ahead_of_a_look_changes_nothing_when_it_goes_on(tmp_path: Path) -> None:
    """A candidate of which all rows are there is dropped where it would have been with fewer."""
    whole = search(tmp_path / "whole", SEARCHES["grid"], SyntheticEvaluator(peak))
    evaluator = SyntheticEvaluator(peak)
    with Study(tmp_path / "ahead", {"model": "synthetic"}, evaluator.items) as study:
        measure(evaluator, study, {"alpha": 0.0}, *(point.params for point in whole.points))
    evaluator.measured.clear()
    assert compared(search(tmp_path / "ahead", SEARCHES["grid"], evaluator)) == compared(whole)
    assert not evaluator.measured


def test_a_killed_search_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    alone = search(tmp_path / "alone", SEARCHES["grid"], SyntheticEvaluator(peak))
    evaluator = SyntheticEvaluator(peak)
    for size, limit in ((3, 250), (5, 600), (2, 1000), (4, None)):
        evaluator.fail_after = limit
        team = Shuffled(evaluator, size, size)
        if limit is None:
            result = search(tmp_path / "stopped", SEARCHES["grid"], evaluator, team)
        else:
            with pytest.raises(KeyboardInterrupt):
                search(tmp_path / "stopped", SEARCHES["grid"], evaluator, team)
    assert compared(result) == compared(alone)
    assert max(Counter(evaluator.measured).values()) == 1


def test_trials_at_once_repeat_whatever_the_number_of_workers(tmp_path: Path) -> None:
    found, sizes = {}, []
    about = Settings(score="score", baseline={"a": 0.0, "b": 0.0})

    def searcher(url: str) -> Iterator[Any]:
        search = optuna_search(RANGES, about, storage=url, trials=6, at_once=4)
        batch = next(search)
        while True:
            sizes.append(len(batch))
            outcomes = yield batch
            try:
                batch = search.send(outcomes)
            except StopIteration:
                return

    for size in (1, 3):
        evaluator = SyntheticEvaluator(bowl, items=160)
        team = Shuffled(evaluator, size, 0)
        url = f"sqlite:///{tmp_path}/{size}.db"
        result = search(
            tmp_path / str(size),
            lambda same, url=url: searcher(url),  # type: ignore[misc]
            evaluator,
            team,
            baseline=about.baseline,
        )
        found[size] = compared(result)
        assert (team.most > 1) == (size > 1)
    assert found[1] == found[3]
    assert sizes == [4, 2, 4, 2]


def test_workers_go_on_with_their_own_candidate_and_help_with_another(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(peak, items=64)
    one: Params
    one, other = {"alpha": 1.0}, {"alpha": 2.0}
    with Study(tmp_path, {}, evaluator.items) as study:
        team = Shuffled(evaluator, 3, 0)
        team.items = study.items
        measuring = Measuring(team, study, evaluator.portions(study.items))
        demands = [Demand(one, study.items), Demand(other, study.items)]
        measuring.step(demands)
        assert list(team.candidates.values()) == ["alpha=1", "alpha=2", "alpha=1"], "the third one helps"
        before = dict(team.candidates)
        measuring.step(demands)
        assert team.candidates == before, "each goes on with what it has loaded"
        measuring.measure(*demands)
        assert not study.missing(one, study.items) and not study.missing(other, study.items)
