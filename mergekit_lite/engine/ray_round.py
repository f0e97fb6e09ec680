"""One call for work on a Ray cluster: its tasks, who is at them, and which of them a worker may hang at."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LATE, TIMES_LATE = 60.0, 5  # seconds, and times the longest task so far, after which an idle worker does a task, too


@dataclass(eq=False)
class Worker:
    """One worker, as the driver sees it: where it is, the handle of its actor, and whether it may be given tasks.

    ``done`` are the bytes of the tasks that it has done in this round, ``told`` those that it says it has made.
    """

    node: str
    actor: Any
    is_fit: bool = False
    done: int = 0
    told: int = 0

    @property
    def ahead(self) -> int:
        """Bytes that it has made of tasks that are not done yet."""
        return max(0, self.told - self.done)


@dataclass
class Round:
    """One call of ``Cluster.run``: its tasks, those that wait, what each worker is at, and how often tasks got lost."""

    number: int
    job: Any  # reference of what the tasks are done by
    tasks: Sequence[bytes]
    sizes: Sequence[int]
    waiting: deque[int]
    under_way: dict[Any, tuple[Worker, int | None]] = field(default_factory=dict)  # None: it looks around
    ready: list[Worker] = field(default_factory=list)
    losses: Counter[int] = field(default_factory=Counter)
    given: dict[Any, float] = field(default_factory=dict)  # when each task under way was
    late: set[Any] = field(default_factory=set)  # references of those that were given to another worker, too
    longest: float = 0.0  # seconds that a task took, from when it was given
    done: set[int] = field(default_factory=set)
    asked: dict[Any, Worker] = field(default_factory=dict)  # for news
    asked_at: float = field(default_factory=time.monotonic)

    def next(self) -> int | None:
        """Take a task that waits, if there is one."""
        while self.waiting:
            if (task := self.waiting.popleft()) not in self.done:
                return task
        return None

    def next_late(self) -> int | None:
        """Take the task that a worker is at for longest, if that is too long: it may hang, and never die.

        Before the first task is done nobody knows what is long.
        """
        at = [
            reference
            for reference, (_, task) in self.under_way.items()
            if task is not None and task not in self.done and reference not in self.late
        ]
        if not self.done or not at:
            return None
        first = min(at, key=self.given.__getitem__)
        if time.monotonic() - self.given[first] <= max(LATE, TIMES_LATE * self.longest):
            return None
        self.late.add(first)
        return self.under_way[first][1]

    def is_news(self, reference: Any, task: int) -> bool:
        """Note that a task is done; return whether it wasn't before."""
        self.longest = max(self.longest, time.monotonic() - self.given.pop(reference))
        is_news = task not in self.done
        self.done.add(task)
        return is_news
