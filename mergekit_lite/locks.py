"""Locks that one process holds on a file, and that the system takes back when it ends, in whatever way."""

from __future__ import annotations

import os
from pathlib import Path

from mergekit_lite.positioned import open_file


def lock_file(path: Path) -> int | None:
    """Lock a file, which is made where it is missing, without waiting; a link is not followed.

    Returns:
        its descriptor, which holds the lock until it is closed; None where another process holds it.

    Raises:
        OSError: the file can't be opened or locked.
    """
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT, links=False)
    try:
        if take_lock(descriptor):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def take_lock(descriptor: int) -> bool:
    """Lock an open file; return False where another process holds the lock. Raises OSError."""
    from filelock import lock_descriptor

    return lock_descriptor(descriptor, blocking=False)
