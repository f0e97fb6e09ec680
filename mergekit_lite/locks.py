"""Locks: on files, which the system takes back when a process ends, and between threads of a process that forks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock on a file, which is made where it is missing, until the block ends; wait while another has it.

    Raises OSError as ``lock_file``.
    """
    from filelock import lock_descriptor

    with os.fdopen(open_file(path, os.O_RDWR | os.O_CREAT, links=False), "rb") as file:
        lock_descriptor(file.fileno())
        yield


def take_lock(descriptor: int) -> bool:
    """Lock an open file; return False where another process holds the lock. Raises OSError."""
    from filelock import lock_descriptor

    return lock_descriptor(descriptor, blocking=False)


class ThreadLock:
    """A lock between threads that a forked process has anew: whoever held it at the fork isn't there to release it."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def _renew(self) -> None:
        self._lock = threading.Lock()
