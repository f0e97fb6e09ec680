"""An end to waiting: what would block for ever fails instead."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


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
