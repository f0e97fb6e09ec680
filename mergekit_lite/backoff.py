"""Waits before something is asked for again: each twice the one before, up to a longest one, and up to half less.

The draw keeps those that failed together from asking together again.
"""

from __future__ import annotations

import random
import time
from email.utils import parsedate_to_datetime

FIRST, LONGEST = 0.1, 15.0  # seconds
LONGEST_ASKED = 120.0  # seconds that a server may ask to wait


def wait_after(failures: int, asked: float = 0.0, *, first: float = FIRST, longest: float = LONGEST) -> float:
    """Return the seconds to wait after ``failures`` in a row, at least those that a server ``asked`` for."""
    doublings = min(max(failures, 1) - 1, 60)
    return max(asked, min(longest, first * 2.0**doublings) * random.uniform(0.5, 1))


def asked_wait(header: str | None, most: float = LONGEST_ASKED) -> float:
    """Return the seconds of a Retry-After header, which has a number or a date, up to ``most``."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return min(seconds, most) if seconds > 0 else 0.0  # NaN is not
