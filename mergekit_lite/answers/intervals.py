"""Paired differences of models that answered the same items, and their intervals.

All models are measured on the same items, in the same order, with the same draws. So the difference of two is taken
item by item, and what is common to both, above all how hard an item is, cancels.

Intervals are BCa bootstrap intervals (Efron, "Better bootstrap confidence intervals", 1987) of a mean over items:
they follow skewed scores, stay within the range of the scores, and need no library. The resamples are seeded, so an
interval depends on the differences alone. It is about other items of the same kind: not about other kinds, nor about
other answers to these items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
RESAMPLED_AT_ONCE = 1 << 21  # resampled items at once

Values: TypeAlias = Mapping[str, float | None]
Floats: TypeAlias = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean over ``items`` items, and the interval around it; NaN without items."""

    mean: float
    low: float
    high: float
    items: int

    @property
    def above(self) -> bool:
        """Whether all of it is above 0."""
        return self.low > 0

    @property
    def below(self) -> bool:
        """Whether all of it is below 0."""
        return self.high < 0


def paired(ours: Values, theirs: Values) -> Floats:
    """Return ours − theirs for each item that both have a value of, in our order."""
    return np.array([a - b for item, a in ours.items() if a is not None and (b := theirs.get(item)) is not None])


def interval(values: Sequence[float] | Floats, confidence: float = 0.95) -> Interval:
    """Return the mean and its BCa interval, which is infinite for a single value."""
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return Interval(float(x[0]) if x.size else math.nan, -math.inf, math.inf, x.size)
    mean = float(x.mean())
    if x.min() == x.max():
        return Interval(mean, mean, mean, x.size)
    left_out = (x.sum() - x) / (x.size - 1)
    low, high = bca(mean, resampled_means(x), left_out, confidence)
    return Interval(mean, low, high, x.size)


def bca(estimate: float, resampled: Floats, left_out: Floats, confidence: float) -> tuple[float, float]:
    """Return the ends of a bias-corrected and accelerated (BCa) interval.

    Args:
        estimate: from all items.
        resampled: (RESAMPLES,) estimates, one from each resample.
        left_out: (n,) estimates, each without one item (the jackknife).
        confidence: of the interval, two-sided.
    """
    if resampled.min() == resampled.max():
        return estimate, estimate
    normal = NormalDist()
    # The bias: how far the estimate is from the median of the resamples, in standard deviations.
    share = float(((resampled < estimate).mean() + (resampled <= estimate).mean()) / 2)  # ties half
    bias = normal.inv_cdf(min(max(share, 1 / resampled.size), 1 - 1 / resampled.size))
    # The acceleration: how fast the spread changes with the estimate, from the skewness of the jackknife.
    away = left_out.mean() - left_out
    spread = float((away**2).sum())
    acceleration = float((away**3).sum()) / (6 * spread**1.5) if spread else 0.0

    def end(tail: float) -> float:  # the quantile of the resamples at which this tail ends
        z = bias + normal.inv_cdf(tail)
        return normal.cdf(bias + z / (1 - acceleration * z))

    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [end(tail), end(1 - tail)])
    return float(low), float(high)


def resampled_means(columns: Floats) -> Floats:
    """Return means over resampled items: (n,) gives (RESAMPLES,), (n, k) gives (RESAMPLES, k)."""
    n = columns.shape[0]
    return np.asarray(np.concatenate([often.astype(np.float64) @ columns for often in _draws(n)]) / n)


@lru_cache(maxsize=4)
def _draws(n: int) -> tuple[NDArray[np.uint8], ...]:
    """Draw how often each resample has each item, in chunks of resamples; the same for all statistics of n items."""
    rng = np.random.default_rng(n)
    rows = max(1, RESAMPLED_AT_ONCE // n)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return tuple(_counts(rng.integers(0, n, size=(size, n))) for size in sizes)


def _counts(chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Count the items of each row's resample. More than 255 of one item has a chance below 10⁻⁵⁰⁰."""
    size, n = chosen.shape
    places = chosen + n * np.arange(size)[:, None]
    return np.bincount(places.ravel(), minlength=size * n).astype(np.uint8).reshape(size, n)
