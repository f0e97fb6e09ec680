"""The searches on curves with a known best."""

from __future__ import annotations

import math
import random

import pytest

from mergekit_lite.boosting.candidates.candidate import Params
from mergekit_lite.boosting.search.search import automatic_step, bracket, grid
from tests.boost.synthetic import alphas, best, tried

# The orders that the paper's appendix B tells, as numbers; the aligned model has 0.
TEN_PERCENT = {5: 2.0, 10: 1.5, 7: 2.4, 8: 2.6, 9: 2.3}
TWENTY_PERCENT = {1: 1.2, 2: 2.1, 2.5: 2.25, 3: 1.6, 4: -0.5}
FORTY_PERCENT = {0.4: 0.8, 0.5: 1.0, 0.6: -0.2}


@pytest.mark.parametrize(
    ("curve", "start", "step", "expected", "chosen"),
    [
        (TEN_PERCENT, 5, 5, [5, 10, 7, 8, 9], 8),
        (TWENTY_PERCENT, 2, 2, [2, 4, 1, 3, 2.5], 2.5),
        (FORTY_PERCENT, 0.5, 0.1, [0.5, 0.6, 0.4], 0.5),
    ],
    ids=["10 %", "20 %", "40 %"],
)
@pytest.mark.parametrize("told", [False, True], ids=["automatic last step", "the paper's last step"])
def test_the_papers_traces(
    curve: dict[float, float], start: float, step: float, expected: list[float], chosen: float, told: bool
) -> None:
    last = {8: 1.0, 2.5: 0.5, 0.5: 0.1}[chosen] if told else None
    asked = alphas(bracket(start=start, step=step, final_step=last), curve.__getitem__)
    assert asked == expected
    assert best(asked, curve.__getitem__) == chosen


@pytest.mark.parametrize("start", [0.5, 1, 5])
def test_none_helps(start: float) -> None:
    asked = alphas(bracket(start=start), lambda alpha: -alpha)
    assert min(asked) == 0.1 and best(asked, lambda alpha: -alpha) == 0


def test_a_grid_is_every_combination() -> None:
    values = {"a": [0.1, 0.2], "b": [1.0, 2.0, 3.0]}
    asked = tried(grid(values), lambda params: 0.0)
    assert asked == [{"a": a, "b": b} for a in values["a"] for b in values["b"]]


@pytest.mark.parametrize("trial", range(40))
def test_a_single_peak_is_found_to_the_last_step(trial: int) -> None:
    """Any place of the peak, any steepness, any start: no point next to the answer is left better by a step."""
    rng = random.Random(trial)
    peak, left, right = 10 ** rng.uniform(-1, 1.4), rng.uniform(0.5, 2), rng.uniform(0.5, 8)
    start = 10 ** rng.uniform(-1, 1)

    def score(alpha: float) -> float:
        away = math.log1p(alpha) - math.log1p(peak)
        floor = -left * math.log1p(peak)
        return (left * away if away < 0 else -right * away) - floor

    asked = alphas(bracket(start=start), score)
    found = best(asked, score)
    assert len(asked) <= 16 and len(set(asked)) == len(asked), asked
    steps = [automatic_step(alpha) for alpha in (*asked, found)]
    assert abs(found - peak) <= max(steps) + 1e-9, (peak, asked)
    assert abs(found - peak) <= automatic_step(max(found, peak)) + 1e-9, (peak, found, asked)


def test_a_cliff_is_not_crossed() -> None:
    def score(alpha: float) -> float:
        return alpha if alpha <= 3.2 else -100.0

    asked = alphas(bracket(), score)
    assert 2.7 <= best(asked, score) <= 3.2
    assert len([alpha for alpha in asked if alpha > 4]) == 0


def test_points_out_of_limits_are_as_a_cliff() -> None:
    def score(alpha: float) -> float | None:
        return alpha if alpha <= 3.2 else None

    asked = alphas(bracket(), score)
    assert 2.7 <= best(asked, score) <= 3.2
    same = alphas(bracket(same=lambda *which: True), score)
    assert max(same) == 4, "out of limits is worse even where the noise is large"


def test_of_two_peaks_one_is_found() -> None:
    def score(alpha: float) -> float:
        return math.exp(-((alpha - 1) ** 2)) + 2 * math.exp(-((alpha - 12) ** 2)) - math.exp(-1)

    asked = alphas(bracket(), score)
    assert best(asked, score) == pytest.approx(1, abs=0.2)


def test_a_plateau_is_walked_over() -> None:
    """No better is not worse: the doubling goes on, to the last point that is allowed, and nothing is bisected."""
    asked = alphas(bracket(most=16, same=lambda *which: True), lambda alpha: 1.0)
    assert asked == [0.5, 1, 2, 4, 8, 16]


def test_what_noise_hides_is_not_refined() -> None:
    def score(alpha: float) -> float:
        return -((alpha - 2.6) ** 2) + 2.6**2

    def same(one: Params, other: Params, errors: int) -> bool:
        return abs(score(one["alpha"]) - score(other["alpha"])) < 0.5 * errors

    assert alphas(bracket(), score) == [0.5, 1, 2, 4, 3, 2.5]
    assert alphas(bracket(same=same), score) == [0.5, 1, 2, 4, 3], "2 is as good as 3, and preferred"


def test_no_point_is_beyond_the_most() -> None:
    asked = alphas(bracket(most=3), lambda alpha: alpha)
    assert max(asked) == 3 and best(asked, lambda alpha: alpha) == 3


@pytest.mark.parametrize(
    ("alpha", "step"), [(8, 1), (2.5, 0.5), (0.5, 0.1), (0, 0.1), (0.3, 0.1), (1.25, 0.25), (25, 5), (5, 1)]
)
def test_the_automatic_step(alpha: float, step: float) -> None:
    assert automatic_step(alpha) == pytest.approx(step)
