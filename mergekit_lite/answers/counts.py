"""Intervals and tests of what can be counted: answers that are right or wrong, and items where one of two is better.

A bootstrap knows only what it has seen: of none right in thirty it says that none ever is, and of three better and none
worse that this is sure. These intervals follow from the binomial distribution. Rates have Wilson's ("Probable
inference", 1927). Differences of two that answered the same items have Tango's score interval ("Equivalence test and
confidence interval for the difference in proportions for the paired-sample design", 1998), which is drawn to 0 where
McNemar's mid-p test does not reject (Fagerland, Lydersen, Laake, "The McNemar test for binary matched-pairs data",
2013). Mid-p errs as rarely as it says on average over how many items are unequal; but with 16 unequal ones, for
instance, in 7.7 % of cases at 5 %. So the exact test may err ``SLACK`` times as often as asked, and no more.

Also Student's quantiles, for means over few items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

SLACK = 1.2  # the exact test alone, 1, would err in about 3 % of cases at 5 %, and see less
PRECISE = 1e-10


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the ends of Wilson's score interval of a rate, of ``successes`` among ``n`` items."""
    z = _normal(confidence)
    rate, square = successes / n, z * z / n
    centre = (rate + square / 2) / (1 + square)
    half = z * math.sqrt(rate * (1 - rate) / n + square / (4 * n)) / (1 + square)
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)


def paired_rates(better: int, worse: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the ends of the interval of (better − worse)/n; 0 is outside of it where ``sure`` says so."""
    z = _normal(confidence)
    low, high = _tango(better, worse, n, z), -_tango(worse, better, n, z)
    if (low > 0 or high < 0) and not sure(better, worse, confidence):
        return min(low, 0.0), max(high, 0.0)
    return low, high


@lru_cache(maxsize=1 << 12)
def sure(better: int, worse: int, confidence: float) -> bool:
    """Return whether McNemar's test rejects that better and worse are equally likely."""
    if better == worse:
        return False
    unequal, fewer = better + worse, min(better, worse)
    below = sum(math.comb(unequal, k) for k in range(fewer))
    at = math.comb(unequal, fewer)
    mid_p, exact = (2 * below + at) / (1 << unequal), 2 * (below + at) / (1 << unequal)
    return mid_p < 1 - confidence and exact < SLACK * (1 - confidence)


def _tango(better: int, worse: int, n: int, z: float) -> float:
    """Return the lower end δ of the score interval: where the difference is ``z`` standard errors above it.

    The standard error is that under δ, with the share of worse items that is the likeliest for it.
    """

    def away(delta: float) -> float:
        b = (2 * n - better + worse) * delta - better - worse
        c = -worse * delta * (1 - delta)
        likeliest = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * likeliest + delta * (1 - delta))
        distance = better - worse - n * delta
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    return _crossing(lambda delta: z - away(delta), -1.0, (better - worse) / n)


@lru_cache
def student(confidence: float, freedom: int) -> float:
    """Return how many standard errors a two-sided interval of Student's distribution reaches."""
    high = 2.0
    while _within(high, freedom) < confidence:
        high *= 2
    return _crossing(lambda t: _within(t, freedom) - confidence, 0.0, high)


def _within(t: float, freedom: int) -> float:
    """Return P(|T| < t), by the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine * cosine * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return (2 / math.pi) * (angle + sine * total) if odd else sine * total


def _crossing(rising: Callable[[float], float], low: float, high: float) -> float:
    """Return where a rising function crosses 0 between two places."""
    while high - low > PRECISE * max(1.0, abs(low)):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return low


def _normal(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
