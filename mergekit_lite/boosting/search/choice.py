"""From measured candidates to a choice that holds: bad ones are dropped early, the best is confirmed on held-out items.

docs/boost.md says by which rules, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import NormalDist
from typing import Any

import numpy as np

from mergekit_lite.answers.intervals import Floats, Interval, difference
from mergekit_lite.boosting.candidates.candidate import Evaluator, ItemRow, Params, label
from mergekit_lite.boosting.search.flips import stays
from mergekit_lite.boosting.search.looks import FIRST_LOOK, looks, shared_confidence
from mergekit_lite.boosting.search.point import Point, Settings, beyond, called, plain, point, values
from mergekit_lite.boosting.search.search import CLOSE, Same, Search, SearchOutcome
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.errors import MergekitLiteError, UsageError

PARTS = 4  # of the items measured so far: all must be beyond a limit to drop a candidate early
DETAILS = ("gain", "beyond", "dropped", "guards", "others", "facts")  # that a dashboard shows besides the score
Searcher = Callable[[Same], Search]


@dataclass(frozen=True)
class Result:
    """The result of a search."""

    settings: Settings  # how candidates were judged
    baseline: Point  # on the items of the search
    points: tuple[Point, ...]  # the candidates in the order they were tried
    picked: Point | None  # the candidate that the search prefers; None where none beats the baseline
    held_out: Point | None  # the picked candidate on held-out items; None where none was held out, or nothing picked
    chosen: Params | None  # the params to write a model with; None where no candidate helps
    items: int = 0  # clusters of items that the search used
    items_held_out: int = 0  # clusters that it didn't
    stays: Mapping[float, float] = field(
        default_factory=dict
    )  # how often the choice stays, by the labels' flipped share
    broken: Mapping[str, str] = field(default_factory=dict)  # what is wrong with judges, by score

    def called(self, candidate: Point) -> str:
        """Return how a candidate, or the baseline, is called in sentences."""
        return called(candidate, [each.name for each in self.points])


def boost(
    searcher: Searcher,
    evaluator: Evaluator,
    study: Study,
    settings: Settings,
    progress: Callable[[Point], None] = lambda point: None,
    test: Callable[[Mapping[str, ItemRow]], Mapping[str, str]] = lambda rows: {},
) -> Result:
    """Search, choose, confirm.

    Args:
        searcher: begins the search, given a test of whether two candidates are the same.
        evaluator: measures.
        study: stores rows, and has all items.
        settings: how candidates are judged.
        progress: called with each candidate when its last row is in.
        test: called with the baseline's rows before any candidate is measured; returns what is wrong with judges, by
            score. Where that is the deciding score, nothing is searched and nothing chosen.

    Raises:
        MergekitLiteError: the baseline has no score of the deciding scorer.
        UsageError: the settings name a scorer that gave no scores, or the search can't begin.
    """
    searched = _searched(len(study.clusters), settings)
    apart = list(chain.from_iterable(study.clusters[searched:]))
    contest = Contest(study.clusters[:searched], evaluator, study, settings)
    search = searcher(contest.same)
    broken = test(contest.measure_baseline())
    counts: dict[str, Any] = {"items": searched, "items_held_out": len(study.clusters) - searched, "broken": broken}
    if settings.score in broken:
        return Result(settings, contest.baseline, (), None, None, None, **counts)
    outcome = None
    while True:
        try:
            params = search.send(outcome) if outcome else next(search)
        except StopIteration:
            break
        before = len(contest.points)
        outcome = contest.outcome(params)
        if len(contest.points) > before:
            progress(contest.points[label(params)])
    picked = contest.preferred(corrected=not apart)
    confirmed = None
    if picked and apart:
        for params in (settings.baseline, picked.params):
            study.measured(params, apart, evaluator)
        confirmed = point(picked.params, apart, study, settings)
    failed = confirmed is not None and (not confirmed.gain.above or confirmed.beyond)
    chosen = picked.params if picked and not failed else None
    firm = contest.stays(picked, apart) if picked and not failed else {}
    points = tuple(contest.points.values())
    return Result(settings, contest.baseline, points, picked, confirmed, chosen, stays=firm, **counts)


def _searched(total: int, settings: Settings) -> int:
    """Return how many clusters the search uses, in whole batches; all where too few would be held out to compare."""
    exact = total - round(total * settings.held_out)
    even = round(exact / settings.batch) * settings.batch
    searched = even if FIRST_LOOK <= even <= total - FIRST_LOOK else exact
    return searched if total - searched >= FIRST_LOOK else total


class Contest:
    """Candidates measured on common items, and compared."""

    def __init__(self, clusters: Sequence[Sequence[str]], evaluator: Evaluator, study: Study, settings: Settings):
        self.clusters, self.items = clusters, list(chain.from_iterable(clusters))
        self.evaluator, self.study, self.settings = evaluator, study, settings
        self.points: dict[str, Point] = {}
        self.baseline: Point
        self.best: Point

    def measure_baseline(self) -> dict[str, ItemRow]:
        """Measure the baseline, which the others are compared with, and return its rows."""
        rows = self.study.measured(self.settings.baseline, self.items, self.evaluator)
        _check_scorers(rows, self.settings)
        self.baseline = self.best = point(self.settings.baseline, self.items, self.study, self.settings)
        return rows

    def outcome(self, params: Params) -> SearchOutcome:
        """Measure a candidate, unless it is the baseline or known, and return what the search is sent."""
        name = label(params)
        if name == self.baseline.name:
            return SearchOutcome(0.0)
        if name not in self.points:
            self.points[name] = new = self._measured(params)
            if new.allowed and new.gain.mean > self.best.gain.mean:
                self.best = new
        measured = self.points[name]
        details = {name: plain(getattr(measured, name)) for name in DETAILS}
        return SearchOutcome(self._score(measured), not measured.beyond and measured.gain.items > 0, details)

    def same(self, one: Params, other: Params, errors: int) -> bool:
        """Return whether the difference is 0 to within ``errors`` standard errors."""
        confidence = 2 * NormalDist().cdf(errors) - 1
        difference = self._difference(one, other, self.items, confidence)
        return not difference.above and not difference.below

    def preferred(self, corrected: bool) -> Point | None:
        """Return the candidate nearest to the baseline among those that beat it and equal the best.

        Equal is what lies within one standard error. ``corrected``: the confidence is that of all candidates together.
        """
        confidence = self._confidence(corrected)
        base = self.baseline.params
        allowed = [one for one in self.points.values() if one.allowed]
        better = [one for one in allowed if self._difference(one.params, base, self.items, confidence).above]
        best = max(better, key=lambda one: one.gain.mean, default=None)
        close = [one for one in better if best and self.same(one.params, best.params, CLOSE)]
        return min(close, key=self._distance, default=None)

    def stays(self, picked: Point, apart: Sequence[str]) -> dict[float, float]:
        """Return how often the picked one is chosen again where labels flip, by their share; ``apart`` confirm it."""
        allowed = [one for one in self.points.values() if one.allowed]
        return stays(
            {one.name: self._gains(one.params, self.items) for one in allowed},
            {one.name: self._distance(one) for one in allowed},
            self._gains(picked.params, apart) if apart else None,
            picked.name,
            self._confidence(corrected=not apart),
        )

    def _gains(self, params: Params, items: Sequence[str]) -> Floats:
        """Return the paired differences of all clusters of these items, NaN where there is none."""
        base, ours = (
            values(self.study.rows(each, items), self.settings.score) for each in (self.baseline.params, params)
        )
        pairs = ((ours.get(name), theirs) for name, theirs in base.items())
        return np.array([np.nan if a is None or b is None else a - b for a, b in pairs])

    def _confidence(self, corrected: bool) -> float:
        confidence = self.settings.confidence
        return shared_confidence(confidence, len(self.points)) if corrected and self.points else confidence

    def _measured(self, params: Params) -> Point:
        sizes = looks(len(self.clusters), self.settings.batch)
        if not self.settings.stop_early or len(self.study.rows(params, self.items)) == len(self.items):
            sizes = [len(self.clusters)]  # a look would save nothing
        confidence = shared_confidence(self.settings.confidence, len(sizes))
        why = ""
        for size in sizes:
            items = list(chain.from_iterable(self.clusters[:size]))
            self.study.measured(params, items, self.evaluator)
            if size < len(self.clusters) and (why := self._hopeless(params, items, confidence)):
                break
        return point(params, items, self.study, self.settings, why)

    def _hopeless(self, params: Params, items: Sequence[str], confidence: float) -> str:
        for other in (self.baseline, self.best):
            lost = self._difference(params, other.params, items, confidence)
            if lost.below and lost.items >= FIRST_LOOK:
                return f"surely worse than {called(other, list(self.points))}"
        parts = [items[part::PARTS] for part in range(PARTS)]
        passed = [beyond(params, part, self.study, self.settings) for part in parts]
        return f"throughout {passed[0][0]}" if all(passed) else ""

    def _score(self, candidate: Point) -> float:
        """Return the gain; of a dropped candidate the best's gain, less the loss against it on common items.

        So one that was measured on easy items only doesn't seem better than the candidate it lost to.
        """
        if not candidate.dropped:
            return candidate.gain.mean
        lost = self._difference(candidate.params, self.best.params, self.items, self.settings.confidence).mean
        return min(self.best.gain.mean + lost, candidate.gain.mean)

    def _difference(self, one: Params, other: Params, items: Sequence[str], confidence: float) -> Interval:
        ours, theirs = (values(self.study.rows(each, items), self.settings.score) for each in (one, other))
        return difference(ours, theirs, confidence)

    def _distance(self, candidate: Point) -> float:
        """Return the squared distance to the baseline, each parameter in units of the width that was tried."""
        total = 0.0
        for name, value in candidate.params.items():
            tried = [other.params[name] for other in (self.baseline, *self.points.values()) if name in other.params]
            width = max(tried) - min(tried)
            total += ((value - self.settings.baseline[name]) / width) ** 2 if width else 0.0
        return total


def _check_scorers(rows: Mapping[str, ItemRow], settings: Settings) -> None:
    known = list(dict.fromkeys(name for row in rows.values() for name in row["values"]))
    for name in (settings.score, *settings.limits.loss):
        if name not in known:
            raise UsageError(f"No scorer is called {name!r}; there are: {', '.join(known) or 'none'}.")
    if all(value is None for value in values(rows, settings.score).values()):
        raise MergekitLiteError(
            f"{settings.score} gave no verdict on any answer of {label(settings.baseline)}, so there is nothing to "
            "compare with. Look at the answers in the study's folder, and at what the scorer needs."
        )
