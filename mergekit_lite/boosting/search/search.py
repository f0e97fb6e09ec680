"""Searches: generators of the params to try next.

A search yields the params of candidates that can be measured side by side, is sent a ``SearchOutcome`` of each, in
their order, and ends when it has seen enough. It knows no models, so that its steps can be followed on paper.

``bracket`` is the procedure of ExPO's authors (Zheng et al., arXiv 2404.16792, appendix B), who did it by hand and
released no code. Here it is one rule, which gives the paper's three searches; docs/boost.md has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from mergekit_lite.boosting.candidates.candidate import Params
from mergekit_lite.boosting.candidates.ranges import tidy

START, MOST = 0.5, 32.0
LEAST_STEP = 0.1
SHARE = 5  # the automatic last step is at most a fifth of the best alpha
ROUND_STEPS = (5.0, 2.5, 1.0)  # times a power of ten


class SearchOutcome(NamedTuple):
    """A candidate's result, as a search is sent it."""

    score: float  # higher is better, 0 as good as the baseline
    allowed: bool = True  # within all limits
    details: Mapping[str, Any] = MappingProxyType({})  # for dashboards, as JSON can hold them


Search = Generator[Sequence[Params], Sequence[SearchOutcome], None]
# Whether two candidates are the same to within a number of standard errors of their difference.
Same = Callable[[Params, Params, int], bool]
CLOSE, SURE = 1, 2  # standard errors: below one a difference is ignored, above two it ends a climb


def grid(values: Mapping[str, Sequence[float]]) -> Search:
    """Yield every combination of the values, in the order given, all together."""
    yield [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]


def bracket(
    name: str = "alpha",
    start: float = START,
    step: float | None = None,
    final_step: float | None = None,
    most: float = MOST,
    same: Same = lambda one, other, errors: False,
    origin: float = 0.0,
    unit: float = 1.0,
) -> Search:
    """Probe outwards, then bisect around the best.

    1. Up from ``start`` by ``step``, which doubles each time, until a point is surely worse than the best so far.
    2. Where ``start`` is still the best: down likewise, until a point is not better.
    3. The wider gap between the best point and its neighbours is halved, until none is wider than the last step;
       of two gaps as wide the one to the better neighbour. Points are multiples of the last step, rounded down.

    Points beyond a limit are worse than all others. "Surely" means by two standard errors. A gap to a neighbour within
    one standard error of the best is not halved: points between could not be distinguished from either. Where that is
    the neighbour below, the search ends, as that one will be preferred. The bracket finds one maximum, perhaps not the
    highest of several.

    Args:
        name: of the parameter.
        start: the first point.
        step: the first step; ``start`` by default, so that each point is twice the one before.
        final_step: the last step; by default the largest of 1, 2.5 or 5 times a power of ten that is at most a fifth
            of the best point, and at least 0.1.
        most: no point is larger.
        same: whether two candidates are the same to within some standard errors; by default scores have no noise.
        origin: the baseline's value. Points are counted from it.
        unit: what a point of 1 adds to it.
    """
    curve = _Curve(name, same, origin, unit)
    yield from _climb(curve, start, step or start, most)
    yield from _climb(curve, start, -(step or start), most)
    yield from _narrow(curve, final_step)


class _Curve:
    """The scores of the points known so far; the baseline has 0."""

    def __init__(self, name: str, same: Same, origin: float, unit: float):
        self.name = name
        self.same_params = same
        self.origin, self.unit = origin, unit
        self.scores = {0.0: 0.0}

    @property
    def best(self) -> float:  # of equal ones the smallest
        return max(sorted(self.scores), key=lambda point: self.scores[point])

    def params(self, point: float) -> Params:
        return {self.name: tidy(self.origin + self.unit * point)}

    def ask(self, point: float) -> Search:
        if point not in self.scores:
            (outcome,) = yield [self.params(point)]
            self.scores[point] = outcome.score if outcome.allowed else -math.inf

    def same(self, one: float, other: float, errors: int) -> bool:
        finite = min(self.scores[one], self.scores[other]) > -math.inf
        return finite and self.same_params(self.params(one), self.params(other), errors)

    def worse(self, point: float) -> bool:
        return self.scores[point] < self.scores[self.best] and not self.same(point, self.best, SURE)

    def neighbours(self, point: float) -> list[float]:
        below = [other for other in self.scores if other < point]
        above = [other for other in self.scores if other > point]
        return ([max(below)] if below else []) + ([min(above)] if above else [])


def _climb(curve: _Curve, start: float, step: float, most: float) -> Search:
    """Go from ``start`` in doubling steps: up while it gets no worse, down while it gets better."""
    point = start
    yield from curve.ask(point)
    while (not curve.worse(point) and point < most) if step > 0 else (curve.best == point and point > 0):
        point = tidy(min(max(point + step, 0.0), most))
        step *= 2
        yield from curve.ask(point)


def _narrow(curve: _Curve, final_step: float | None) -> Search:
    """Halve the wider gap beside the best point until none is wider than the last step."""
    while True:
        best = curve.best
        last = final_step or automatic_step(best)
        if any(other < best and curve.same(best, other, CLOSE) for other in curve.neighbours(best)):
            return
        open_gaps = [
            (tidy(abs(best - other)), curve.scores[other], other)
            for other in curve.neighbours(best)
            if tidy(abs(best - other)) > last and not curve.same(best, other, CLOSE)
        ]
        if not open_gaps:
            return
        *_, other = max(open_gaps)
        yield from curve.ask(_between(min(best, other), max(best, other), last))


def _between(low: float, high: float, step: float) -> float:
    """Return the middle, rounded down to a multiple of the step where one lies between."""
    middle = tidy((low + high) / 2)
    rounded = tidy(math.floor(tidy(middle / step)) * step)
    return rounded if low < rounded < high else middle


def automatic_step(best: float) -> float:
    """Return the last step for a best point: 1 for 8, 0.5 for 2.5, 0.1 for 0.5, as in the paper's searches."""
    if best / SHARE <= LEAST_STEP:
        return LEAST_STEP
    power = 10.0 ** math.floor(math.log10(best / SHARE))
    return max(tidy(power * times) for times in ROUND_STEPS if power * times <= best / SHARE * (1 + 1e-9))
