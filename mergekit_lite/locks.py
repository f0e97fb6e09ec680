"""Locks that one process holds on a file, and that the system takes back when it ends, in whatever way."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from mergekit_lite.positioned import open_file


def lock_file(path: Path) -> BinaryIO | None:
    """Lock a file, which is made where it is missing, without waiting; a link is not followed.

    Returns:
        the open file, which holds the lock until it is closed; None where another process holds it.

    Raises:
        OSError: the file can't be opened or locked.
    """
    with ExitStack() as opened:
        file = opened.enter_context(os.fdopen(open_file(path, os.O_RDWR | os.O_CREAT, links=False), "rb"))
        if not take_lock(file.fileno()):
            return None
        opened.pop_all()
        return file


def take_lock(descriptor: int) -> bool:
    """Lock an open file; return False where another process holds the lock. Raises OSError."""
    from filelock import lock_descriptor

    return lock_descriptor(descriptor, blocking=False)
