"""How far this process is with tasks that take long: what a worker elsewhere tells of them before they are done."""

from __future__ import annotations

import threading


class Made:
    """Bytes read for the spans that were made in a round of tasks. It may be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._round = 0
        self.nbytes = 0

    def begin(self, number: int) -> None:
        """Begin to count anew, unless the round of this number has begun already."""
        with self._lock:
            if number != self._round:
                self._round, self.nbytes = number, 0

    def add(self, nbytes: int) -> None:
        """Count a span."""
        with self._lock:
            self.nbytes += nbytes


MADE = Made()  # by this process
