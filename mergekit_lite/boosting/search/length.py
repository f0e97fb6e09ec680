"""Gains that are only a matter of length.

Judges and reward models like long answers, and extrapolation makes answers longer. Two figures separate them.

``at_equal_length`` works with any score: the paired differences of the score are regressed on those of the length, and
the intercept is the gain at equal lengths.

``win_rates`` is for pairwise preferences, a logistic model of which of two answers is better:

    P(answer i is preferred) = σ(w_length·tanh(Δ_i / std Δ) + w_model)

with Δ the baseline's length − the answer's in characters. The rate at equal length leaves the length term out. The
weights are L1-penalised; the penalty is chosen by 5-fold cross-validation among ten. Two coefficients need no library:
``fit`` is Newton's method with an L1 penalty.

It is the core of AlpacaEval's length-controlled win rate (Dubois et al., arXiv 2404.04475) without what only
AlpacaEval's data have: how hard each instruction is for the baseline, and answers of a baseline that was asked to be
verbose and concise. Without them it is another number, and so has another name: of 57 models with published judgements
it lies 6.5 points off on average (``benchmarks.win_rates``), and shortening answers can be rewarded.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from mergekit_lite.answers.intervals import Floats, Interval, bca, of_differences, resampled_means

PENALTIES = 10.0 ** np.linspace(-4, 4, 10)  # C, as scikit-learn's LogisticRegressionCV has by default
FOLDS = 5
TINY = 1e-15
RIDGE = 1e-6


class LengthEffect(NamedTuple):
    """A gain without the part that goes with length."""

    gain: Interval  # the mean paired difference
    at_equal_length: Interval  # the gain where the answers are as long as the baseline's
    longer: float  # the mean difference in length, in characters

    @property
    def only_length(self) -> bool:
        """Whether the gain is sure, and the one at equal length is not."""
        return self.gain.above and not self.at_equal_length.above and self.longer > 0


def at_equal_length(gains: Floats, longer: Floats, confidence: float = 0.95) -> LengthEffect | None:
    """Regress ``gain = a + b·z + c·tanh(z)`` with ``z = longer / std longer``, and return a with its interval.

    Scores grow with length in proportion, or up to some length, or in between; the two terms fit each of these. None
    for fewer than four items, or where all answers changed by the same length.

    Args:
        gains: (n,) paired differences of the score.
        longer: (n,) length of the answer − length of the baseline's.
        confidence: of the interval.
    """
    spread = longer.std(ddof=1) if longer.size > 3 else 0.0
    if spread == 0:
        return None
    z = longer / spread
    columns = np.stack([np.ones_like(z), z, np.tanh(z)], axis=1)
    # Least squares needs means of products only: of the columns with each other (3 × 3) and with the gains (3 × 1).
    # They are computed item by item, so that one matrix product gives those of all resamples, and a subtraction those
    # of all items but one.
    products = np.concatenate(
        [columns[:, :, None] * columns[:, None, :], (columns * gains[:, None])[:, :, None]], axis=2
    )
    moments = products.reshape(len(z), -1)
    left_out = (moments.sum(0) - moments) / (len(moments) - 1)
    intercept = float(_intercept(moments.mean(0)))
    low, high = bca(intercept, _intercept(resampled_means(moments)), _intercept(left_out), confidence)
    left = Interval(intercept, low, high, gains.size)
    return LengthEffect(of_differences(gains, confidence), left, float(longer.mean()))


def _intercept(moments: Floats) -> Floats:
    """Solve least squares for a, given the means of the products in the last axis (…, 12); gives (…).

    A small ridge keeps the system solvable where the columns are nearly dependent.
    """
    products = moments.reshape(*moments.shape[:-1], 3, 4)
    normal, right = products[..., :3], products[..., 3:]
    return np.asarray(np.linalg.solve(normal + RIDGE * np.diag([0.0, 1.0, 1.0]), right)[..., 0, 0])


class Judgements(NamedTuple):
    """Pairwise preferences of one set of answers over the baseline's."""

    preferred: Floats  # (n,) probability that the answer is better, 0 to 1
    length: Floats  # (n,) characters of the answer
    baseline_length: Floats  # (n,) characters of the baseline's answer


class WinRates(NamedTuple):
    """Win rates in percent."""

    raw: float  # the mean preference
    at_equal_length: float  # what the logistic model says it would be at equal length
    weights: tuple[float, float]  # of length and model

    @property
    def extreme(self) -> bool:
        """Whether the two are so far apart that AlpacaEval would warn."""
        low = min(0.75 * self.raw, self.raw - 10)
        high = max(self.raw + (100 - self.raw) / 4, self.raw + 10)
        return not low <= self.at_equal_length <= high


def win_rates(judged: Judgements) -> WinRates:
    """Compute a candidate's win rate against the baseline, and the one at equal length."""
    shorter = judged.baseline_length - judged.length
    spread = shorter.std(ddof=1) if shorter.size > 1 else 0.0
    ones = np.ones_like(judged.preferred)
    length = np.tanh(shorter / spread) if spread else np.zeros_like(ones)
    of_length, of_model = fit_cross_validated(np.stack([length, ones], axis=1), judged.preferred, ones)
    equal = 100 * float(_sigmoid(of_model))
    return WinRates(100 * float(judged.preferred.mean()), equal, (float(of_length), float(of_model)))


def fit_cross_validated(features: Floats, preferred: Floats, weight: Floats) -> Floats:
    """Fit with the penalty that predicts the rows left out best; of equal ones the strongest."""
    fold = np.arange(len(preferred)) % FOLDS
    losses = np.zeros(len(PENALTIES))
    for number in range(FOLDS):
        within, out = fold != number, fold == number
        for place, c in enumerate(PENALTIES):
            w = fit(features[within], preferred[within], weight[within], c)
            losses[place] += _loss(features[out] @ w, preferred[out], weight[out])
    return fit(features, preferred, weight, float(PENALTIES[int(losses.argmin())]))


def fit(features: Floats, preferred: Floats, weight: Floats, c: float) -> Floats:
    """Return the w that minimises |w|₁ + c·Σ weight·cross-entropy(preferred, σ(features·w)); no intercept.

    Proximal Newton: each step minimises the quadratic model plus the penalty, and is halved until the objective falls.
    It is for few features k, as the cost of a step grows as 3ᵏ.

    Args:
        features: (n, k).
        preferred: (n,) targets, 0 to 1.
        weight: (n,).
        c: strength of the data against the penalty.

    Returns:
        (k,).
    """
    w = np.zeros(features.shape[1])

    def objective(at: Floats) -> float:
        return float(np.abs(at).sum()) + c * _loss(features @ at, preferred, weight)

    value = objective(w)
    for _ in range(200):
        # The quadratic model of the cross-entropy at w.
        p = _sigmoid(features @ w)
        slope = c * features.T @ (weight * (p - preferred))
        curvature = c * (features * (weight * p * (1 - p))[:, None]).T @ features
        step = _penalised_step(w, slope, curvature)
        while objective(w + step) > value and np.abs(step).max() > TINY:
            step /= 2
        w, before, value = w + step, value, objective(w + step)
        if before - value <= 1e-14 * abs(before):
            break
    return w


def _penalised_step(w: Floats, slope: Floats, curvature: Floats) -> Floats:
    """Return the step that minimises slope·step + ½ step·curvature·step + |w + step|₁.

    For given signs of w + step, 0 included, that is a linear system. Two weights have 9 choices of signs; among the
    solutions with the signs that were assumed, the one with the least value is the minimum.
    """
    curvature = curvature + np.eye(w.size) * (1e-9 * np.trace(curvature) + TINY)
    signs = _signs(w.size)  # one linear system for each row
    on = signs != 0
    # Where a weight becomes 0 its equation is step = −w, else curvature·step = −slope − sign.
    systems = np.where(on[:, :, None], curvature, np.eye(w.size))
    steps = np.linalg.solve(systems, np.where(on, -slope - signs, -w)[:, :, None])[:, :, 0]
    steps = np.where(on, steps, -w)  # exactly, without the solver's rounding
    values = steps @ slope + ((steps @ curvature) * steps).sum(1) / 2 + np.abs(w + steps).sum(1)
    as_given = (np.sign(np.where(on, w + steps, 0.0)) == signs).all(1)
    return np.asarray(steps[np.where(as_given, values, np.inf).argmin()])


@lru_cache
def _signs(number: int) -> Floats:
    """Return all choices of k signs, (3ᵏ, k)."""
    return np.array(list(product((0.0, 1.0, -1.0), repeat=number)))


def _loss(score: Floats, preferred: Floats, weight: Floats) -> float:
    """Return the weighted cross-entropy, without overflow."""
    return float((weight * (np.logaddexp(0, score) - preferred * score)).sum())


def _sigmoid(score: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -score)))
