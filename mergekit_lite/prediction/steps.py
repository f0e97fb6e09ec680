"""What a run does besides arithmetic on weights, in steps of a loop in Python that take as long (measured).

What Ray does is in seconds: they hardly depend on how fast Python is.
"""

from __future__ import annotations

from typing import NamedTuple


class Steps(NamedTuple):
    """Work that comes with each tensor, and with each task.

    A task's takes longer than it would alone: weights have just gone through the processor's caches.
    """

    tensor: int = 0
    task: int = 0

    def plus(self, other: Steps) -> Steps:
        """Return both."""
        return Steps(self.tensor + other.tensor, self.task + other.task)


# By the command:
BEFORE = Steps(2_500)  # before there are workers: what to do
MEANWHILE = Steps(1_600, 2_500)  # while they work: tasks, journal
RECEIVED = Steps(0, 10_000)  # likewise, where a worker is a process of its own: what it sends
AFTER = Steps(5_000)  # report, index, manifest
ENDING = 3_500_000  # for all: workers begin and end; config, card, the renames; the process goes

# By a worker:
BY_WORKER = Steps(2_600, 4_000)
SENT = Steps(1_500, 15_000)  # where it is a process of its own: what it is sent, and sends
BY_RAY = 3e-3  # seconds, where Ray brings a task (measured)
