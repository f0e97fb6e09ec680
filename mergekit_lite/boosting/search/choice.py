"""From measured candidates to a choice that holds.

A candidate is measured in looks: an eighth, a quarter, half, all of the items. After each but the last it is dropped if
it is surely worse than the best so far or than the baseline, or beyond a limit in every quarter of what was measured;
"surely" is corrected for the number of looks. So a bad candidate costs an eighth, and a good one is measured whole. The
figure of a dropped candidate leans downwards, as it was dropped when it looked bad; it is told how much was measured.

The highest of many noisy figures leans upwards. So the last part of the items takes no part in the search: the chosen
candidate and the baseline meet on these, once, and that interval is the answer. With too few items for it the
interval on the search's own items is corrected for the number of candidates instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import NormalDist
from typing import Any

from mergekit_lite.answers.intervals import Interval, interval, paired
from mergekit_lite.boosting.candidates.candidate import Bench, Numbers, Row, label
from mergekit_lite.boosting.search.looks import FIRST_LOOK, looks, shared_confidence
from mergekit_lite.boosting.search.point import Point, Settings, beyond, plain, point, values
from mergekit_lite.boosting.search.search import CLOSE, Outcome, Same, Search
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.errors import MergekitLiteError, UsageError

PARTS = 4  # of what was measured: each must be beyond a limit to drop a candidate early
Searcher = Callable[[Same], Search]


@dataclass(frozen=True)
class Result:
    """What came of a search.

    Attributes:
        baseline: on the items of the search.
        points: the candidates in the order they were tried.
        picked: what the search prefers; None where nothing beats the baseline.
        held_out: the same on items that took no part; None where there are none, or nothing was picked.
        chosen: the numbers to write a model with; None: no candidate helps.
    """

    settings: Settings
    baseline: Point
    points: tuple[Point, ...]
    picked: Point | None
    held_out: Point | None
    chosen: Numbers | None


def boost(
    searcher: Searcher,
    bench: Bench,
    study: Study,
    settings: Settings,
    progress: Callable[[Point], None] = lambda point: None,
) -> Result:
    """Search, choose, confirm.

    Args:
        searcher: makes the search, given what tells noise from difference.
        bench: measures.
        study: what is kept; all items are its.
        settings: how candidates are judged.
        progress: told of each candidate when its last row is in.

    Raises:
        MergekitLiteError: the baseline has no verdict of the deciding scorer.
        UsageError: a scorer that is named is not among those that gave verdicts.
    """
    searched = _searched(len(study.subjects), settings)
    apart = _flat(study.subjects[searched:])
    contest = Contest(study.subjects[:searched], bench, study, settings)
    search = searcher(contest.same)
    contest.begin()
    outcome = None
    while True:
        try:
            numbers = search.send(outcome) if outcome else next(search)
        except StopIteration:
            break
        before = len(contest.points)
        outcome = contest.outcome(numbers)
        if len(contest.points) > before:
            progress(contest.points[label(numbers)])
    picked = contest.preferred(corrected=not apart)
    confirmed = _confirmed(apart, bench, study, settings, picked) if picked and apart else None
    failed = confirmed is not None and (not confirmed.gain.above or confirmed.beyond)
    chosen = picked.numbers if picked and not failed else None
    return Result(settings, contest.baseline, tuple(contest.points.values()), picked, confirmed, chosen)


def _searched(total: int, settings: Settings) -> int:
    """How many subjects the search goes by, in whole batches; all where those held out would be too few to tell."""
    exact = total - round(total * settings.held_out)
    even = round(exact / settings.batch) * settings.batch
    searched = even if FIRST_LOOK <= even <= total - FIRST_LOOK else exact
    return searched if total - searched >= FIRST_LOOK else total


class Contest:
    """Candidates measured on common items, and compared."""

    def __init__(self, subjects: Sequence[Sequence[str]], bench: Bench, study: Study, settings: Settings):
        self.subjects, self.items = subjects, _flat(subjects)
        self.bench, self.study, self.settings = bench, study, settings
        self.points: dict[str, Point] = {}
        self.baseline: Point
        self.best: Point

    def begin(self) -> None:
        """Measure the baseline."""
        rows = self.study.measured(self.settings.baseline, self.items, self.bench)
        _check_scorers(rows, self.settings)
        self.baseline = self.best = point(self.settings.baseline, self.items, self.study, self.settings)

    def outcome(self, numbers: Numbers) -> Outcome:
        """Measure a candidate, if it isn't the baseline or known, and tell the search."""
        name = label(numbers)
        if name == self.baseline.name:
            return Outcome(0.0)
        if name not in self.points:
            self.points[name] = new = self._measured(numbers)
            if new.allowed and new.gain.mean > self.best.gain.mean:
                self.best = new
        found = self.points[name]
        return Outcome(self._score(found), not found.beyond and found.gain.items > 0, _details(found))

    def same(self, one: Numbers, other: Numbers, errors: int) -> bool:
        """Whether the difference is 0 to within so many standard errors."""
        confidence = 2 * NormalDist().cdf(errors) - 1
        difference = self._difference(one, other, self.items, confidence)
        return not difference.above and not difference.below

    def preferred(self, corrected: bool) -> Point | None:
        """Of the candidates that beat the baseline and are within one standard error of the best, the nearest to it.

        ``corrected``: all of them together are taken for better by chance as seldom as one would be.
        """
        confidence = self.settings.confidence
        if corrected and self.points:
            confidence = shared_confidence(confidence, len(self.points))
        base = self.baseline.numbers
        allowed = [one for one in self.points.values() if one.allowed]
        better = [one for one in allowed if self._difference(one.numbers, base, self.items, confidence).above]
        best = max(better, key=lambda one: one.gain.mean, default=None)
        close = [one for one in better if best and self.same(one.numbers, best.numbers, CLOSE)]
        return min(close, key=self._distance, default=None)

    def _measured(self, numbers: Numbers) -> Point:
        sizes = looks(len(self.subjects), self.settings.batch)
        if not self.settings.stop_early or len(self.study.rows(numbers, self.items)) == len(self.items):
            sizes = [len(self.subjects)]  # nothing to save
        confidence = shared_confidence(self.settings.confidence, len(sizes))
        why = ""
        for size in sizes:
            items = _flat(self.subjects[:size])
            self.study.measured(numbers, items, self.bench)
            if size < len(self.subjects) and (why := self._hopeless(numbers, items, confidence)):
                break
        return point(numbers, items, self.study, self.settings, why)

    def _hopeless(self, numbers: Numbers, items: Sequence[str], confidence: float) -> str:
        """Why no more of this candidate need be measured, or nothing."""
        for other in (self.baseline, self.best):
            lost = self._difference(numbers, other.numbers, items, confidence)
            if lost.below and lost.items >= FIRST_LOOK:
                return f"surely worse than {other.name}"
        parts = [items[part::PARTS] for part in range(PARTS)]
        found = [beyond(numbers, part, self.study, self.settings) for part in parts]
        return f"throughout {found[0][0]}" if all(found) else ""

    def _score(self, found: Point) -> float:
        """The gain; for a candidate that was dropped, the best's gain less what it lost to it on common items.

        So one that was measured on easy items only doesn't seem better than what it lost to.
        """
        if not found.dropped:
            return found.gain.mean
        lost = self._difference(found.numbers, self.best.numbers, self.items, self.settings.confidence).mean
        return min(self.best.gain.mean + lost, found.gain.mean)

    def _difference(self, one: Numbers, other: Numbers, items: Sequence[str], confidence: float) -> Interval:
        ours, theirs = (values(self.study.rows(each, items), self.settings.score) for each in (one, other))
        return interval(paired(ours, theirs), confidence)

    def _distance(self, found: Point) -> float:
        """From the baseline, each number by the width of what was tried."""
        total = 0.0
        for name, value in found.numbers.items():
            tried = [other.numbers[name] for other in (self.baseline, *self.points.values()) if name in other.numbers]
            width = max(tried) - min(tried)
            total += ((value - self.settings.baseline[name]) / width) ** 2 if width else 0.0
        return total


def _confirmed(items: Sequence[str], bench: Bench, study: Study, settings: Settings, picked: Point) -> Point | None:
    """The picked candidate against the baseline on items that the search didn't see."""
    if not items:
        return None
    for numbers in (settings.baseline, picked.numbers):
        study.measured(numbers, items, bench)
    return point(picked.numbers, items, study, settings)


def _flat(subjects: Sequence[Sequence[str]]) -> list[str]:
    return list(chain.from_iterable(subjects))


def _details(found: Point) -> dict[str, Any]:
    """What a dashboard may show beside the score."""
    shown = ("gain", "beyond", "dropped", "guards", "others", "facts")
    return {name: plain(getattr(found, name)) for name in shown}


def _check_scorers(rows: Mapping[str, Row], settings: Settings) -> None:
    known = list(dict.fromkeys(name for row in rows.values() for name in row["values"]))
    for name in (settings.score, *settings.limits.loss):
        if name not in known:
            raise UsageError(f"No scorer is called {name!r}; there are: {', '.join(known) or 'none'}.")
    if all(value is None for value in values(rows, settings.score).values()):
        raise MergekitLiteError(
            f"{settings.score} gave no verdict on any answer of {label(settings.baseline)}, so there is nothing to "
            "compare with. Look at the answers in the study's folder, and at what the scorer needs."
        )
