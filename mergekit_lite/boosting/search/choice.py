"""From measured candidates to a choice that holds: bad ones are dropped early, the best is confirmed on held-out items.

docs/boost.md says by which rules, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from statistics import NormalDist
from typing import Any

import numpy as np

from mergekit_lite.answers.intervals import Floats, Interval, difference
from mergekit_lite.boosting.candidates.candidate import Alone, Evaluator, ItemRow, Params, Team, label
from mergekit_lite.boosting.search.flips import Kept, stays
from mergekit_lite.boosting.search.looks import FIRST_LOOK, looks, shared_confidence
from mergekit_lite.boosting.search.measuring import Demand, Measuring
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
    stays: Mapping[float, Kept] = field(default_factory=dict)  # how often the choice does, by the labels' flipped share
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
    team: Team | None = None,
    so_far: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Search, choose, confirm.

    The result doesn't depend on the team: candidates are judged in the order in which the search names them.

    Args:
        searcher: begins the search, given a test of whether two candidates are the same.
        evaluator: measures.
        study: stores rows, and has all items.
        settings: how candidates are judged.
        progress: called with each candidate when its last row is in.
        test: called with the baseline's rows before any candidate is measured; returns what is wrong with judges, by
            score. Where that is the deciding score, nothing is searched and nothing chosen.
        team: measures side by side; by default this process alone, with the evaluator.
        so_far: called with what is known, nothing picked yet, after the baseline and after each candidate.

    Raises:
        MergekitLiteError: the baseline has no score of the deciding scorer.
        UsageError: the settings name a scorer that gave no scores, or the search can't begin.
    """
    searched = _searched(len(study.clusters), settings)
    apart = list(chain.from_iterable(study.clusters[searched:]))
    meets = settings.baseline if settings.head_to_head else None
    measuring = Measuring(team or Alone(evaluator, study.items), study, evaluator.portions(study.items), meets)
    contest = Contest(study.clusters[:searched], measuring, study, settings)
    search = searcher(contest.same)
    broken = test(contest.measure_baseline())
    counts: dict[str, Any] = {"items": searched, "items_held_out": len(study.clusters) - searched, "broken": broken}
    if settings.score in broken:
        return Result(settings, contest.baseline, (), None, None, None, **counts)

    def known() -> Result:
        return Result(settings, contest.baseline, tuple(contest.points.values()), None, None, None, **counts)

    def measured(candidate: Point) -> None:
        progress(candidate)
        so_far(known())

    so_far(known())
    outcomes: list[SearchOutcome] = []
    while True:
        try:
            outcomes = contest.outcomes(search.send(outcomes) if outcomes else next(search), measured)
        except StopIteration:
            break
    picked = contest.preferred(corrected=not apart)
    confirmed = None
    if picked and apart:
        measuring.measure(*(Demand(params, apart) for params in (settings.baseline, picked.params)))
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


@dataclass
class Course:
    """A candidate on its way from look to look."""

    params: Params
    sizes: Sequence[int]  # clusters, at each look; the last one is all
    passed: int = 0  # looks
    best: Point | None = None  # the candidate that it was compared with at these
    hopeless: str = ""  # why it fails the look after those passed; empty while it doesn't


class Contest:
    """Candidates measured on common items, and compared."""

    def __init__(self, clusters: Sequence[Sequence[str]], measuring: Measuring, study: Study, settings: Settings):
        self.clusters, self.items = clusters, list(chain.from_iterable(clusters))
        self.measuring, self.study, self.settings = measuring, study, settings
        self.points: dict[str, Point] = {}
        self.baseline: Point
        self.best: Point

    def measure_baseline(self) -> dict[str, ItemRow]:
        """Measure the baseline, which the others are compared with, and return its rows."""
        self.measuring.measure(Demand(self.settings.baseline, self.items))
        rows = self.study.rows(self.settings.baseline, self.items)
        _check_scorers(rows, self.settings)
        self.baseline = self.best = point(self.settings.baseline, self.items, self.study, self.settings)
        return rows

    def outcomes(self, batch: Sequence[Params], progress: Callable[[Point], None]) -> list[SearchOutcome]:
        """Measure candidates, but the baseline and those that are known, and return what the search is sent.

        They are judged one after the other, in their order, as if each had been measured before the next was begun.
        """
        new = {label(params): params for params in batch}
        left = [self._course(params) for name, params in new.items() if name not in {self.baseline.name, *self.points}]
        while left:
            while left and self._is_through(left[0]):
                progress(self._taken(left.pop(0)))
            if left:
                self.measuring.step(self._demands(left))
        return [self._outcome(params) for params in batch]

    def _outcome(self, params: Params) -> SearchOutcome:
        if label(params) == self.baseline.name:
            return SearchOutcome(0.0)
        measured = self.points[label(params)]
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

    def stays(self, picked: Point, apart: Sequence[str]) -> dict[float, Kept]:
        """Return how often the picked one, or one as good, is chosen where labels flip; ``apart`` confirm it."""
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

    def _course(self, params: Params) -> Course:
        total = len(self.clusters)
        return Course(params, looks(total, self.settings.batch) if self.settings.stop_early else [total])

    def _is_through(self, course: Course) -> bool:
        """Take a candidate's looks as far as rows are there; return whether it has failed one or passed all.

        While those before it aren't all judged, the best candidate may change: then its looks are taken again.
        """
        if course.best is not self.best:
            course.best, course.passed, course.hopeless = self.best, 0, ""
        confidence = shared_confidence(self.settings.confidence, len(course.sizes))
        while not course.hopeless and course.passed < len(course.sizes):
            items = self._items(course)
            if self.study.missing(course.params, items):
                return False
            if len(items) < len(self.items):
                course.hopeless = self._hopeless(course.params, items, confidence)
            course.passed += not course.hopeless
        return True

    def _items(self, course: Course) -> list[str]:
        """Return the items of a candidate's next look, or of the last one."""
        size = course.sizes[min(course.passed, len(course.sizes) - 1)]
        return list(chain.from_iterable(self.clusters[:size]))

    def _taken(self, course: Course) -> Point:
        """Take a candidate that is through among the points, perhaps as the best one."""
        new = point(course.params, self._items(course), self.study, self.settings, course.hopeless)
        self.points[new.name] = new
        if new.allowed and new.gain.mean > self.best.gain.mean:
            self.best = new
        return new

    def _demands(self, left: Sequence[Course]) -> Iterator[Demand]:
        """Yield what is wanted of the next candidates.

        One that seems hopeless has to wait until those before it are judged. Workers without anything else measure
        what comes after a look before it is passed: where it isn't, only their time is lost.
        """
        under_way = [course for course in islice(left, 2 * self.measuring.team.size) if not self._is_through(course)]
        yield from (Demand(course.params, self._items(course)) for course in under_way)
        if self.measuring.can_run_ahead:
            yield from (Demand(course.params, self.items, ahead=True) for course in under_way)

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
