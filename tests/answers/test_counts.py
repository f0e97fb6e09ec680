"""Intervals and tests of counts: second implementations, tables, and how often they err."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest

from mergekit_lite.answers.counts import paired_rates, student, sure, wilson

NOMINAL, MOST = 0.05, 0.06  # false positives


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@lru_cache
def told_apart(unequal: int) -> float:
    """How often two equal models are told apart by such a number of unequal items."""
    return sum(math.comb(unequal, k) for k in range(unequal + 1) if sure(k, unequal - k, 1 - NOMINAL)) / 2**unequal


def false_positives(n: int, discordance: float) -> float:
    """Exactly: how often two equal models that differ on such a share of n items are told apart."""
    return sum(binomial(n, unequal, discordance) * told_apart(unequal) for unequal in range(n + 1))


@pytest.mark.parametrize("n", [5, 8, 16, 30, 43, 100])
def test_equal_models_are_told_apart_in_less_than_six_in_a_hundred(n: int) -> None:
    found = {q: false_positives(n, q) for q in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)}
    assert max(found.values()) < MOST, found
    if n >= 100:
        assert found[0.3] > 0.03, "a test that sees nothing errs never"


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [(3, 0, False), (5, 0, False), (6, 0, True), (0, 6, True), (7, 1, False), (9, 1, True), (12, 4, False)],
)
def test_few_items_prove_little(better: int, worse: int, expected: bool) -> None:
    """By hand: 2/2⁶ = 3.1 %, but 2/2⁵ = 6.3 %; 18/256 = 7 %; 22/1024 = 2.1 %; exactly 7.7 % with 12 to 4."""
    assert sure(better, worse, 0.95) is expected
    for n in (30, 650):
        low, high = paired_rates(better, worse, n, 0.95)
        assert (low > 0 or high < 0) is expected
        assert low <= (better - worse) / n <= high


@pytest.mark.parametrize(("better", "worse", "n"), [(10, 2, 40), (0, 0, 25), (25, 0, 25), (7, 7, 14), (1, 12, 60)])
def test_the_ends_are_where_the_likelihood_says(better: int, worse: int, n: int) -> None:
    """A second implementation: the share of worse items is found on a grid, and the ends likewise."""
    z, equal = 1.959963984540054, n - better - worse
    inside = []
    for delta in np.linspace(-0.9995, 0.9995, 2000):
        p = np.linspace(max(0.0, -delta), (1 - delta) / 2, 4001)[1:-1]  # of worse; better is p + delta
        likelihood = worse * np.log(p) + better * np.log(p + delta)
        likelihood += equal * np.log(np.maximum(1 - 2 * p - delta, 1e-300)) if equal else 0
        share = p[likelihood.argmax()]
        away = (better - worse - n * delta) / math.sqrt(n * (2 * share + delta * (1 - delta)))
        inside += [delta] if abs(away) <= z else []
    low, high = paired_rates(better, worse, n, 0.95)
    assert (min(inside), max(inside)) == pytest.approx((low, high), abs=2e-3)


@pytest.mark.parametrize(("n", "p", "q"), [(30, 0.1, 0.1), (30, 0.4, 0.1), (100, 0.3, 0.05), (100, 0.02, 0.02)])
def test_differences_are_covered(n: int, p: float, q: float) -> None:
    covered = 0.0
    for better in range(n + 1):
        for worse in range(n - better + 1):
            chance = binomial(n, better, p) * binomial(n - better, worse, q / (1 - p))
            if chance > 1e-6:
                low, high = paired_rates(better, worse, n, 0.95)
                covered += chance * (low <= p - q <= high)
    assert covered > 0.93


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.95])
def test_rates_are_covered_on_average_over_sizes(rate: float) -> None:
    covered = []
    for n in range(20, 120):
        ends = [wilson(k, n, 0.95) for k in range(n + 1)]
        covered.append(sum(binomial(n, k, rate) for k, (low, high) in enumerate(ends) if low <= rate <= high))
    assert 0.94 < np.mean(covered) < 0.975


def test_none_right_is_not_never() -> None:
    low, high = wilson(0, 30, 0.95)
    assert low == 0 and high == pytest.approx(0.1135, abs=1e-4)
    assert wilson(30, 30, 0.95) == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (5, 0.99, 4.0321),
        (10, 0.9, 1.8125),
        (29, 0.95, 2.0452),
        (1000, 0.95, 1.9623),
    ],
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, confidence: float, expected: float) -> None:
    assert student(confidence, freedom) == pytest.approx(expected, abs=1e-4)
