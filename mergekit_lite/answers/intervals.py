"""Paired differences of models that answered the same items, and their intervals.

All models are measured on the same items, in the same order, with the same draws. So the difference of two is taken
item by item, and what is common to both, above all how hard an item is, cancels.

Where scores are 0 or 1, and where all items that differ do so by the same amount, intervals are made from counts
(``counts``). Else each end is the farther one of two intervals' ends. BCa bootstrap intervals (Efron, "Better bootstrap
confidence intervals", 1987) follow skewed scores; the resamples are seeded, so an interval depends on the values alone.
They are too narrow for few values, for heavy tails, and where all but few are the same. Student's interval is not, with
as many degrees of freedom as there are values other than the commonest.

An interval is about other items of the same kind: not about other kinds, nor about other answers to these items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.answers.counts import paired_rates, student, wilson

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

    @property
    def turned(self) -> Interval:
        """The interval of the values with the other sign."""
        return Interval(0.0 - self.mean, 0.0 - self.high, 0.0 - self.low, self.items)


def paired(ours: Values, theirs: Values) -> Floats:
    """Return ours − theirs for each item that both have a value of, in our order."""
    return np.array([a - b for item, a in ours.items() if a is not None and (b := theirs.get(item)) is not None])


def difference(ours: Values, theirs: Values, confidence: float = 0.95) -> Interval:
    """Return the mean of ours − theirs over the items that both have a value of, and its interval."""
    return of_differences(paired(ours, theirs), confidence, all(map(_right_or_wrong, (ours, theirs))))


def of_differences(x: Floats, confidence: float = 0.95, right_or_wrong: bool = False) -> Interval:
    """Return the mean of paired differences, and its interval.

    Args:
        x: (n,) differences, one an item.
        confidence: of the interval, two-sided.
        right_or_wrong: whether what was compared is 0 or 1. Then no difference on any item is no proof that there is
            none; else the interval is the point 0.
    """
    sizes = np.unique(np.abs(x[x != 0]))
    unit = sizes[-1] if sizes.size else float(right_or_wrong)
    if x.size > 1 and unit and np.allclose(sizes, unit, rtol=1e-9, atol=0):
        better, worse = int((x > 0).sum()), int((x < 0).sum())
        low, high = paired_rates(better, worse, x.size, confidence)
        mean = float(x.mean())  # sizes that differ in their last bits may carry it past an end
        return Interval(mean, min(mean, float(unit * low)), max(mean, float(unit * high)), x.size)
    return _of_mean(x, confidence)


def interval(values: Sequence[float] | Floats, confidence: float = 0.95) -> Interval:
    """Return the mean of one model's scores and its interval, which is infinite for a single value that isn't 0 or 1.

    For differences of two models there is ``difference``.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size and np.isin(x, (0.0, 1.0)).all():
        return Interval(float(x.mean()), *wilson(int(x.sum()), x.size, confidence), x.size)
    if x.size and np.isin(x, (0.0, -1.0)).all():  # wrong or right, with the other sign
        return interval(-x, confidence).turned
    return _of_mean(x, confidence)


def _right_or_wrong(values: Values) -> bool:
    return {*values.values()} - {None} in ({0, 1}, {0}, {1}, {0, -1}, {-1})


def _of_mean(x: Floats, confidence: float) -> Interval:
    if x.size < 2:
        return Interval(float(x[0]) if x.size else math.nan, -math.inf, math.inf, x.size)
    mean = float(x.mean())
    if x.min() == x.max():
        return Interval(mean, mean, mean, x.size)
    left_out = (x.sum() - x) / (x.size - 1)
    low, high = bca(mean, resampled_means(x), left_out, confidence)
    unlike = x.size - int(np.unique(x, return_counts=True)[1].max())
    half = student(confidence, unlike) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(mean, min(low, mean - half), max(high, mean + half), x.size)


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
