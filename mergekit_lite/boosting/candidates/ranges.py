"""The range of a tuned parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergekit_lite.errors import UsageError

STEPS = 100  # a range has at least as many steps, unless one is given


@dataclass(frozen=True)
class Range:
    """The values of a parameter: ``low``, ``low + step`` … up to ``high``."""

    low: float
    high: float
    step: float


def read_range(text: str) -> Range:
    """Read ``LOW:HIGH`` or ``LOW:HIGH:STEP``; the default step is a power of ten, at most a hundredth of the range.

    Raises:
        UsageError: the text can't be read, or the range is empty.
    """
    parts = text.split(":")
    try:
        low, high, *step = map(float, parts)
        by = step[0] if step else 10.0 ** math.floor(math.log10((high - low) / STEPS) + 1e-9)
    except (ValueError, OverflowError):
        low = high = by = math.nan
    if len(parts) > 3 or not 0 < by <= high - low < math.inf:
        raise UsageError(f"{text!r}: expected LOW:HIGH or LOW:HIGH:STEP, with a step that fits between.")
    return Range(low, tidy(low + math.floor((high - low) / by + 1e-9) * by), by)


def tidy(number: float) -> float:
    """Round away the errors of binary fractions: 0.1 + 0.2 is 0.3."""
    return float(f"{number:.10g}")
