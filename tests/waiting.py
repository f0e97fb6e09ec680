"""Waiting for things, and an end to it: what would block for ever fails instead."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 120.0  # seconds: a machine may be busy


def comes_true(known: Callable[[], bool]) -> bool:
    """Whether something is so, or will be as soon as the machine gets to it."""
    until = time.monotonic() + PATIENCE
    while not known():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def is_gone(process: int) -> bool:
    """Whether a process has ended, or will have in a moment."""

    def ended() -> bool:
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    return comes_true(ended)


@contextmanager
def woken_after(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, even in a system call that never returns."""

    def woken(*_: object) -> None:
        raise TimeoutError("waited for what never comes")

    before = signal.signal(signal.SIGALRM, woken)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
