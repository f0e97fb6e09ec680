"""A machine of a Ray cluster, as those see it who are told what was done there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Node:
    """One machine of the cluster, and what was done there.

    Attributes:
        name: the host's, with the start of the number that Ray gives it.
        workers: that are at work, or looking whether they can be.
        tasks, nbytes: that were done there.
        ahead: bytes of tasks that are not done yet.
        seconds: from its first task to its last result.
        lost: workers that ended before their work was done.
        refused: why it gets no tasks; empty where it does.
    """

    name: str
    workers: int = 0
    tasks: int = 0
    nbytes: int = 0
    ahead: int = 0
    started: float = 0.0
    seconds: float = 0.0
    lost: int = 0
    losses: int = 0  # those since a task was last done there
    refused: str = ""

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return (self.nbytes + self.ahead) / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return what was done there as plain data."""
        done = {"name": self.name, "tasks": self.tasks, "bytes": self.nbytes, "seconds": round(self.seconds, 3)}
        done |= {"bytes_per_second": round(self.rate), "workers_lost": self.lost}
        return done | ({"refused": self.refused} if self.refused else {})
