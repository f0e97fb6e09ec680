"""Why one model's answers are preferred to another's: traits of form, as regressors of who wins.

The outcome of each prompt is 1, ½ or 0 where the one model's answer is preferred, as good, or worse; the regressors are
the differences of the two answers in the traits of ``TRAITS``, divided by their spread s_k:

    P(ours is preferred) = σ(w_0 + Σ_k w_k Δ_k / s_k)

It is a logistic regression with Gaussian priors, w_k ~ N(0, 1) and w_0 ~ N(0, 5²), so that it has a fit for few prompts
and for traits that tell all apart. Intervals are those of the posterior's normal approximation at its highest point
(Laplace). The idea is that of "Dissecting human and LLM preferences" (Li et al. 2024, arXiv 2402.11296), which has
properties that a language model rates; here are only such as can be counted, without a judge.

A trait that goes with winning need not be the reason: answers that say more are longer, and have more lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from mergekit_lite.answers.intervals import Floats, Interval
from mergekit_lite.answers.thoughts import parted

LEAST = 20  # prompts with an outcome, to say anything
PRIOR = 5.0  # standard deviation of the intercept's prior; that of the weights is 1
LIST = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+\S", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE)
BOLD = re.compile(r"(\*\*|__)(?=\S).+?(?<=\S)\1")
CODE = re.compile(r"^[ \t]*```", re.MULTILINE)
HEDGE = re.compile(
    r"\b(?:perhaps|maybe|might|may|could|possibly|probably|likely|seems?|appears?|generally|typically|usually|often|"
    r"sometimes|i think|i believe|it depends|not sure|as an ai)\b",
    re.IGNORECASE,
)
REFUSAL = re.compile(r"\A\W*(?:i['’]m sorry|i am sorry|sorry|i can['’]t|i cannot|i am unable|i['’]m unable)\b", re.I)
COURTESY = re.compile(r"\A\W*(?:sure|certainly|of course|absolutely|great question|thank you|happy to)\b", re.I)
CONVERGED = 1e-12
HEADS = ("trait", "its mean", "the other's", "weight", "part of the win rate", "beyond noise")


def _words(text: str) -> int:
    return max(len(text.split()), 1)


TRAITS: Mapping[str, Callable[[str], float]] = {  # of an answer, by what they are called
    "length, log of characters": lambda text: math.log(1 + len(text)),
    "items of lists": lambda text: float(len(LIST.findall(text))),
    "headings": lambda text: float(len(HEADING.findall(text))),
    "bold passages": lambda text: float(len(BOLD.findall(text))),
    "blocks of code": lambda text: len(CODE.findall(text)) / 2,
    "hedging, in 100 words": lambda text: 100 * len(HEDGE.findall(text)) / _words(text),
    "exclamation marks": lambda text: float(text.count("!")),
    "questions": lambda text: float(text.count("?")),
    "begins with a courtesy": lambda text: float(bool(COURTESY.search(text))),
    "begins with a refusal": lambda text: float(bool(REFUSAL.search(text))),
}


class Compared(NamedTuple):
    """Two answers to one prompt, and which is preferred."""

    ours: str  # with its thoughts, if there are any: traits are those of the answer behind them
    theirs: str
    preferred: float  # 1 for ours, 0 for theirs, ½ for neither


class Effect(NamedTuple):
    """What a trait goes with."""

    trait: str
    ours: float  # its mean in our answers
    theirs: float
    weight: Interval  # change of the log-odds that ours is preferred, for a difference of one spread s_k
    part: float  # of the win rate: by how much it would be lower if the two never differed in this trait

    @property
    def shown(self) -> tuple[tuple[str, float], ...]:
        """The figures of its row in a table, as text and as numbers."""
        weight = self.weight
        return (
            (f"{self.ours:.3g}", self.ours),
            (f"{self.theirs:.3g}", self.theirs),
            (f"{weight.mean:+.2f} [{weight.low:+.2f}, {weight.high:+.2f}]", weight.mean),
            (f"{100 * self.part:+.1f} %", self.part),
            ("yes" if weight.above or weight.below else "no", float(weight.above or weight.below)),
        )


class Reasons(NamedTuple):
    """Why one model wins."""

    prompts: int
    win_rate: float  # ties count half
    alike: Interval  # what it would be of answers that are alike in all traits
    effects: tuple[Effect, ...]  # of the traits in which answers differ, the largest first

    @property
    def told(self) -> str:
        """The win rates in a sentence."""
        low, high = 100 * self.alike.low, 100 * self.alike.high
        return (
            f"It has the better answer to {100 * self.win_rate:.1f} % of {self.prompts:,} prompts, ties counted half. "
            f"Between answers that are alike in all traits it would be {100 * self.alike.mean:.1f} % "
            f"[{low:.1f}, {high:.1f}]. Weights are changes of the log-odds for a usual difference in a trait, with "
            "95 % intervals; the part is what the win rate owes to it. What goes with winning need not be its reason."
        )

    @property
    def table(self) -> list[tuple[str, tuple[tuple[str, float], ...]]]:
        """A row for each trait: its name, then figures as they are shown and as numbers, under ``HEADS``."""
        return [(effect.trait, effect.shown) for effect in self.effects]


def preferred(ours: float | None, theirs: float | None) -> float | None:
    """Return 1 for a higher score of ours, ½ for an equal one, 0 for a lower one; None where one has none."""
    return None if ours is None or theirs is None else (ours > theirs) + (ours == theirs) / 2


def reasons(compared: Sequence[Compared], confidence: float = 0.95) -> Reasons | None:
    """Regress who is preferred on the differences in traits; None for fewer than ``LEAST`` prompts."""
    if len(compared) < LEAST:
        return None
    ours = np.array([_traits(each.ours) for each in compared])
    theirs = np.array([_traits(each.theirs) for each in compared])
    won = np.array([each.preferred for each in compared])
    differences = ours - theirs
    spread = np.sqrt((differences**2).mean(0))
    differing = np.flatnonzero(spread > 0)
    z = np.column_stack([np.ones(len(compared)), differences[:, differing] / spread[differing]])
    weights, covariance = posterior(z, won)
    beyond = NormalDist().inv_cdf((1 + confidence) / 2) * np.sqrt(np.diag(covariance))
    expected = _sigmoid(z @ weights).mean()
    effects = [
        Effect(
            list(TRAITS)[trait],
            float(ours[:, trait].mean()),
            float(theirs[:, trait].mean()),
            _around(weights[place], beyond[place], len(compared)),
            float(expected - _sigmoid(z @ weights - z[:, place] * weights[place]).mean()),
        )
        for place, trait in enumerate(differing, 1)
    ]
    alike = _around(weights[0], beyond[0], len(compared))
    return Reasons(
        len(compared),
        float(won.mean()),
        _share(alike),
        tuple(sorted(effects, key=lambda effect: -abs(effect.weight.mean))),
    )


def posterior(z: Floats, won: Floats) -> tuple[Floats, Floats]:
    """Return the weights of highest posterior density, (k,), and their covariance, (k, k), by Newton's method.

    Args:
        z: (n, k) regressors; the first is the constant.
        won: (n,) outcomes, 0 to 1.
    """
    precision = np.ones(z.shape[1])
    precision[0] = PRIOR**-2
    weights = np.zeros(z.shape[1])

    def objective(at: Floats) -> float:
        score = z @ at
        return float((np.logaddexp(0, score) - won * score).sum() + (precision * at**2).sum() / 2)

    while True:
        p = _sigmoid(z @ weights)
        slope = z.T @ (p - won) + precision * weights
        curvature = (z * (p * (1 - p))[:, None]).T @ z + np.diag(precision)
        step = -np.linalg.solve(curvature, slope)
        if -slope @ step < CONVERGED:  # twice what a step could still gain
            return weights, np.linalg.inv(curvature)
        while objective(weights + step) > objective(weights):
            step = step / 2
        weights = weights + step


def _traits(text: str) -> list[float]:
    answer = parted(text).answer
    return [measure(answer) for measure in TRAITS.values()]


def _around(mean: float, beyond: float, items: int) -> Interval:
    return Interval(float(mean), float(mean - beyond), float(mean + beyond), items)


def _share(log_odds: Interval) -> Interval:
    mean, low, high = _sigmoid(np.array(log_odds[:3])).tolist()
    return Interval(mean, low, high, log_odds.items)


def _sigmoid(score: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -score)))
