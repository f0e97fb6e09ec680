"""The C library of this process: calls that Python has no name for, where the system has them."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def c_function(name: str) -> Any | None:
    """Return a function of the C library, which sets ``ctypes.get_errno()``; None where there is none of this name."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name, None)
    except (OSError, TypeError):  # Windows has no library that holds all a process has loaded
        return None
