"""Averages over the last checkpoints of a training run, which stand for a decay of its learning rate.

Papers: Li et al., "Model Merging in Pre-training of Large Language Models" (PMA), 2025, arXiv 2505.12082; Tian et al.,
"WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training", 2025, arXiv 2507.17634.

    out = Σ cⱼ·xⱼ, the checkpoints j = 1 … n from the first to the last, Σ cⱼ = 1

    uniform        cⱼ = 1/n                                PMA's simple moving average
    linear         cⱼ ∝ j                                  PMA's weighted moving average
    cosine         cⱼ = f((j−1)/n) − f(j/n), f(t) = (1 + cos πt)/2
    inverse-sqrt   the same with f(t) = 1 − √t

Each cⱼ is multiplied by the checkpoint's own weight, if one is given: with ``uniform`` the weights are the given ones.

In WSM a run whose learning rate stayed constant is averaged as if it had decayed like f over the checkpoints: what the
training between the checkpoints j and j + 1 added counts f(j/n) times. The decay f(t) = 1 − t, WSM's linear one, gives
all checkpoints the same weight: that is ``uniform``. ``cosine`` gives the checkpoints in the middle the most weight,
``inverse-sqrt`` the first ones. Both papers take checkpoints at equal intervals; how long a stretch they cover counts
most (WSM), ten or so are enough (PMA). An exponential average is ``ema``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal

from mergekit_lite.methods.contract import Merge, TensorInfo
from mergekit_lite.methods.linear import linear, shares
from mergekit_lite.methods.parameters import PerModel
from mergekit_lite.methods.registry import method

DECAYS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "inverse-sqrt": lambda t: 1 - math.sqrt(t),
}
Schedule = Literal["uniform", "linear", "cosine", "inverse-sqrt"]


def have_a_mean(*, schedule: Schedule, weight: tuple[float, ...]) -> None:
    """Raise UsageError where the weights sum to zero."""
    shares(_weights(schedule, weight))


@method(
    given="run",
    base="none",
    check=have_a_mean,
    formula="Σ c·x, Σ c = 1, c by the schedule",
    source="Li et al. 2025, arXiv 2505.12082; Tian et al. 2025, arXiv 2507.17634",
)
def schedule_average(info: TensorInfo, *, schedule: Schedule = "uniform", weight: PerModel[float] = (1.0,)) -> Merge:
    """Average a run's checkpoints, from the first one listed to the last, as a decay of the learning rate would.

    Args:
        schedule: of the weights; see above.
        weight: of each checkpoint, beside the schedule's.
    """
    return linear(info, weight=_weights(schedule, weight))


def _weights(schedule: Schedule, given: tuple[float, ...]) -> tuple[float, ...]:
    """Return the checkpoints' weights, up to a common factor."""
    count = len(given)
    if schedule == "linear":
        return tuple(number * weight for number, weight in enumerate(given, start=1))
    if schedule not in DECAYS:
        return given
    rates = [DECAYS[schedule](number / count) for number in range(count + 1)]
    return tuple((before - after) * weight for (before, after), weight in zip(pairwise(rates), given, strict=True))
