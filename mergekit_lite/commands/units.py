"""Numbers as text, with their units: bytes, seconds, rates."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Return a number of bytes as text: ``1.50 GB``."""
    if count < 1000:
        return f"{count:.0f} B"
    power = 3 if count >= 1e9 else 2 if count >= 1e6 else 1
    return f"{count / 1000**power:.2f} {'kMG'[power - 1]}B"


def seconds(count: float) -> str:
    """Return a time as text: ``0.42 s``, ``141 s``, ``12 min``, ``3.5 h``."""
    for limit, unit, digits, name in ((10, 1, 2, "s"), (600, 1, 0, "s"), (7200, 60, 0, "min")):
        if count < limit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count / 3600:.1f} h"


def rate_text(rate: float | None) -> str:
    """Return a rate as text: ``1.25 GB/s``; ``no limit`` where there is none."""
    return f"{size(rate)}/s" if rate and not math.isinf(rate) else "no limit"
