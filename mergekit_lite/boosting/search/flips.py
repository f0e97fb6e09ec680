"""How firm a choice is: whether it stays where some labels are wrong.

People and judges contradict themselves on some items. Here a label is which of two answers is better; where it flips,
candidate and baseline change their scores, so the difference has the other sign. A share of them flips by chance, each
candidate's by itself, and the choice is made again from what was measured: by the rule of ``choice``, with intervals
of the normal distribution, as there are many draws.

Of several candidates that are equally good chance chooses another one in each draw, which is no alarm. So a draw is
also counted where the candidate that it chooses is not surely worse than the first choice by the labels as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from mergekit_lite.answers.intervals import Floats
from mergekit_lite.boosting.search.search import CLOSE

SHARES = (0.1, 0.25)  # of the labels
DRAWS = 200


class Kept(NamedTuple):
    """How often a choice stays."""

    same: float  # share of the draws that choose the same candidate
    as_good: float  # share of those that choose it, or one that is not surely worse


def stays(
    gains: Mapping[str, Floats], distances: Mapping[str, float], held_out: Floats | None, picked: str, confidence: float
) -> dict[float, Kept]:
    """Return how often the choice stays, by the share of labels that are flipped.

    Args:
        gains: (n,) by candidate, its paired differences to the baseline on the items of the search, all in one order;
            NaN where there is none.
        distances: of the candidates to the baseline: of equal ones the nearest is chosen.
        held_out: (m,) differences of the chosen candidate that have to confirm it, and stand for those of one that is
            as good; None where none were held out.
        picked: the candidate that is chosen without flips.
        confidence: with which a candidate is better, or worse.
    """
    names = sorted(gains)
    matrix, away = np.stack([gains[name] for name in names]), np.array([distances[name] for name in names])
    first, z = names.index(picked), NormalDist().inv_cdf((1 + confidence) / 2)
    as_good = ~_sure(matrix[first] - matrix, z)
    rng = np.random.default_rng(0)
    found = {}
    for share in SHARES:
        same = good = 0
        for _ in range(DRAWS):
            best = _chosen(_flipped(matrix, share, rng), away, z)
            confirmed = held_out is None or bool(_sure(_flipped(held_out[None], share, rng), z)[0])
            if best is not None and confirmed:
                same += best == first
                good += bool(as_good[best])
        found[share] = Kept(same / DRAWS, good / DRAWS)
    return found


def _flipped(gains: Floats, share: float, rng: np.random.Generator) -> Floats:
    return np.where(rng.random(gains.shape) < share, -gains, gains)


def _chosen(gains: Floats, distances: Floats, z: float) -> int | None:
    """Return the row nearest to the baseline among those that beat it and are within one standard error of the best."""
    better = _sure(gains, z)
    if not better.any():
        return None
    mean, _ = _mean_and_error(gains)
    best = int(np.where(better, mean, -np.inf).argmax())
    apart, error = _mean_and_error(gains - gains[best])
    close = better & (np.abs(apart) <= CLOSE * error)
    return int(np.where(close, distances, np.inf).argmin())


def _sure(gains: Floats, z: float) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    mean, error = _mean_and_error(gains)
    return np.asarray(mean > z * error)


def _mean_and_error(gains: Floats) -> tuple[Floats, Floats]:
    """Return mean and standard error of each row, over what is not NaN."""
    known = ~np.isnan(gains)
    number = np.maximum(known.sum(1), 2)
    mean = np.where(known, gains, 0.0).sum(1) / number
    squares = np.where(known, (gains - mean[:, None]) ** 2, 0.0).sum(1) / (number - 1)
    return mean, np.sqrt(squares / number)
