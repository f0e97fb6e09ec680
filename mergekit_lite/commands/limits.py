"""Limits of the system that were too low: how they are known, and what to say of them."""

from __future__ import annotations

import errno
from types import ModuleType

from mergekit_lite.errors import GOES_ON

FILES = (errno.EMFILE, errno.ENFILE)
# What the loader of libraries says has no number.
FILES_TEXT = "Too many open files"
MEMORY_TEXTS = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")


def limit_reached(error: Exception) -> str | None:
    """Return what to say of an error that a limit of the system caused; None where it has another cause."""
    number, text = getattr(error, "errno", None), str(error)
    if number in FILES or FILES_TEXT in text:
        if (resource := _resource()) is None:
            return f"Too many files are open: give fewer models, or models of fewer shards. {GOES_ON}"
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"Too many files are open: this process may open {limit:,}. Raise the limit: ulimit -n 1024. {GOES_ON}"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(part in text for part in MEMORY_TEXTS):
        return f"The memory ran out{_allowed_memory()}. Raise the limit, or take fewer --threads. {GOES_ON}"
    return None


def _allowed_memory() -> str:
    """Return how much memory this process may take, as the end of a sentence; nothing where there is no limit."""
    if (resource := _resource()) is None:
        return ""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if limit == resource.RLIM_INFINITY else f": this process may take {limit / 1e6:,.0f} MB (ulimit -v)"


def _resource() -> ModuleType | None:
    """Return the module of limits; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource
