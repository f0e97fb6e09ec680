"""Intervals hold what they promise: shown by simulation, seeded."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mergekit_lite.answers.counts import student
from mergekit_lite.answers.intervals import Floats, difference, interval, of_differences, paired
from mergekit_lite.boosting.search.looks import PORTION, looks, portion, shared_confidence

SIMULATIONS = 300


def draw(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Paired differences of known mean 0.2, 0.3 or 1: rewards, verdicts, and skewed ones."""
    if kind == "reward":
        return rng.normal(0.2, 1.5, n)
    if kind == "verdict":
        return rng.choice([-1.0, 0.0, 1.0], size=n, p=[0.1, 0.5, 0.4])
    return rng.lognormal(-0.5, 1.0, n)


MEANS = {"reward": 0.2, "verdict": 0.3, "skewed": 1.0}


@pytest.mark.parametrize(
    ("kind", "n", "least"), [("reward", 32, 0.92), ("reward", 200, 0.93), ("verdict", 100, 0.93), ("skewed", 200, 0.91)]
)
def test_intervals_cover_the_truth_as_often_as_they_say(kind: str, n: int, least: float) -> None:
    rng = np.random.default_rng(1)
    found = [interval(draw(kind, rng, n)) for _ in range(SIMULATIONS)]
    covered = np.mean([one.low <= MEANS[kind] <= one.high for one in found])
    assert least <= covered <= 0.975, covered
    missed_above = np.mean([one.low > MEANS[kind] for one in found])
    assert missed_above <= 0.06, "a candidate that is no better is taken for better"


def test_pairing_takes_out_what_items_have_in_common() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, 300)
    base = {str(i): float(hard[i] + rng.normal(0, 0.3)) for i in range(300)}
    ours = {str(i): float(hard[i] + 0.1 + rng.normal(0, 0.3)) for i in range(300)}
    assert interval(paired(ours, base)).above
    apart = math.sqrt(np.var(list(base.values())) / 300 + np.var(list(ours.values())) / 300)
    assert 1.96 * apart > 0.1, "taken apart the two could not be told from each other"


def test_items_without_a_verdict_on_either_side_are_left_out() -> None:
    ours = {"a": 1.0, "b": None, "c": 2.0, "d": 3.0}
    theirs = {"a": 0.5, "b": 1.0, "c": None, "e": 1.0}
    assert paired(ours, theirs).tolist() == [0.5]


def test_a_confident_interval_is_wider_and_holds_the_other() -> None:
    values = draw("skewed", np.random.default_rng(3), 60)
    narrow, wide = interval(values, 0.8), interval(values, 0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    assert values.min() <= wide.low and wide.high <= values.max()


def test_an_interval_depends_on_the_values_alone_and_moves_with_them() -> None:
    values = draw("reward", np.random.default_rng(4), 50)
    found = interval(values)
    assert interval(values) == found
    moved, turned = interval(values + 3), interval(-values)
    assert moved[:3] == pytest.approx([one + 3 for one in found[:3]])
    assert turned[:3] == pytest.approx([-found.mean, -found.high, -found.low], abs=1e-3)


@pytest.mark.parametrize("values", [[], [0.7]])
def test_too_few_values_tell_nothing(values: list[float]) -> None:
    found = interval(values)
    assert not found.above and not found.below and found.items == len(values)


def test_no_difference_at_all_is_a_point_unless_answers_are_right_or_wrong() -> None:
    values = {str(i): 0.5 * i for i in range(40)}
    assert difference(values, values)[:3] == (0.0, 0.0, 0.0)
    right = {str(i): float(i % 2) for i in range(40)}
    same = difference(right, right)
    assert same.mean == 0 and same.low == -same.high < -0.05


def test_a_rate_of_none_is_not_never() -> None:
    found = interval([0.0] * 30)
    assert found.mean == found.low == 0 and 0.1 < found.high < 0.13
    errors = [-1.0] * 30  # all wrong, of a score of which lower is better
    assert interval(errors).turned[:3] == pytest.approx((1, 1 - found.high, 1))


@pytest.mark.parametrize("n", [30, 650])
@pytest.mark.parametrize("unit", [1.0, 0.2, 9.0])
def test_three_items_that_got_better_prove_nothing(n: int, unit: float) -> None:
    """Exactly, 3 of 3 to one side have p = 0.25, whatever the unit; 9 of 10 have 0.02."""
    x = np.zeros(n)
    x[:3] = unit
    assert not of_differences(x).above
    x[:9], x[9] = unit, -unit
    assert of_differences(x).above and of_differences(-x).below


@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_lies_within_its_interval(sign: int) -> None:
    """Three differences of 0.1 have the mean 0.10000000000000002."""
    found = of_differences(np.full(3, sign * 0.1))
    assert found.low <= found.mean <= found.high


def rarely_different(kind: str, rng: np.random.Generator, n: int, share: float) -> Floats:
    """Paired differences of equal models that differ on a share of the items."""
    x = np.zeros(n)
    unequal = rng.random(n) < share
    many = int(unequal.sum())
    if kind == "normal":
        x[unequal] = rng.normal(0, 1, many)
    elif kind == "heavy tails":
        x[unequal] = rng.standard_t(3, many)
    else:
        x[unequal] = rng.choice([-3, -2, -1, 1, 2, 3], size=many)
    return x


def told_apart(kind: str, n: int, share: float, trials: int) -> float:
    rng = np.random.default_rng([n, round(1000 * share)])
    found = [of_differences(rarely_different(kind, rng, n, share)) for _ in range(trials)]
    return float(np.mean([one.above or one.below for one in found]))


@pytest.mark.parametrize(
    ("kind", "n", "share"),
    [("normal", 5, 1.0), ("normal", 30, 0.1), ("grades", 8, 1.0), ("grades", 100, 0.05), ("heavy tails", 100, 0.3)],
)
def test_equal_models_are_rarely_told_apart(kind: str, n: int, share: float) -> None:
    """By chance 400 trials at 5 % give 8 % or more once in 250."""
    assert told_apart(kind, n, share, 400) < 0.08


def students_ends(x: Floats) -> tuple[Floats, Floats]:
    """The mean of each row, and half of Student's interval: a second implementation, of many rows at once."""
    ordered = np.sort(x, axis=1)
    run = commonest = np.ones(len(x), dtype=int)
    for here, before in zip(ordered.T[1:], ordered.T, strict=False):
        run = np.where(here == before, run + 1, 1)
        commonest = np.maximum(commonest, run)
    reach = np.array([1e9, *(student(0.95, freedom) for freedom in range(1, x.shape[1] + 1))])
    return x.mean(1), reach[x.shape[1] - commonest] * x.std(1, ddof=1) / math.sqrt(x.shape[1])


def test_an_interval_is_no_narrower_than_students() -> None:
    rng = np.random.default_rng(6)
    rows = np.stack([rarely_different("normal", rng, 40, 0.5) for _ in range(30)])
    for x, mean, half in zip(rows, *students_ends(rows), strict=True):
        found = of_differences(x)
        assert found.low <= mean - half + 1e-9 and found.high >= mean + half - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "grades", "heavy tails"])
@pytest.mark.parametrize("n", [5, 8, 16, 30, 60, 100])
def test_equal_models_are_told_apart_in_less_than_six_in_a_hundred(kind: str, n: int) -> None:
    """By Student's interval, which bounds how often the wider one errs; items that differ by one size are counted."""
    rng = np.random.default_rng(n)
    for share in (0.05, 0.1, 0.3, 1.0):
        x = np.stack([rarely_different(kind, rng, n, share) for _ in range(5000)])
        sizes = np.abs(x)
        several = np.where(sizes > 0, sizes, np.inf).min(1) < sizes.max(1)
        mean, half = students_ends(x)
        assert (several & (np.abs(mean) > half)).mean() < 0.06, share


@pytest.mark.parametrize(
    ("total", "batch", "expected"),
    [(1000, 1, [125, 250, 500, 1000]), (1000, 64, [128, 256, 512, 1000]), (100, 8, [32, 56, 100]), (20, 8, [20])],
)
def test_looks_are_whole_batches(total: int, batch: int, expected: list[int]) -> None:
    assert looks(total, batch) == expected


@pytest.mark.parametrize("total", [10, 64, 100, 500, 1600, 5000])
@pytest.mark.parametrize("batch_size", [1, 5, 16, 64, 200])
def test_portions_are_whole_batches_and_no_more_than_the_first_look(total: int, batch_size: int) -> None:
    found = portion(total, batch_size)
    assert found % batch_size == 0
    assert found == batch_size or (found <= PORTION and found <= looks(total)[0])


@pytest.mark.slow
def test_peeking_errs_no_more_often_than_it_says() -> None:
    """A candidate as good as the best is dropped at one of the looks in at most 5 % of the searches."""
    rng = np.random.default_rng(5)
    sizes = looks(400)
    level = shared_confidence(0.95, len(sizes))
    errors = {"each look at 95 %": 0, "all looks together": 0}
    for _ in range(SIMULATIONS):
        values = draw("reward", rng, 400) - 0.2
        errors["each look at 95 %"] += any(interval(values[:n]).below or interval(values[:n]).above for n in sizes)
        errors["all looks together"] += any(interval(values[:n], level).below for n in sizes)
    assert errors["all looks together"] / SIMULATIONS <= 0.05
    assert errors["each look at 95 %"] / SIMULATIONS > 0.08, "why looks are corrected for"
