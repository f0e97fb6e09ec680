"""How a number grows over training: functions of the share of steps done to a share of the final value."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Literal

Schedule = Literal["linear", "constant", "cosine"]


def linear(progress: float) -> float:
    """t / T: what WRPO was published with."""
    return progress


def constant(progress: float) -> float:
    """The final value from the start."""
    return 1.0


def cosine(progress: float) -> float:
    """(1 − cos πt/T) / 2: slow, fast, slow."""
    return (1 - cos(pi * progress)) / 2


SCHEDULES: dict[Schedule, Callable[[float], float]] = {"linear": linear, "constant": constant, "cosine": cosine}


def scheduled(final: float, schedule: Schedule, progress: float) -> float:
    """The value after this share of the steps, which stays what it is beyond the last."""
    return final * SCHEDULES[schedule](min(max(progress, 0.0), 1.0))
