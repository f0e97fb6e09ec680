"""A team of workers elsewhere, each with a model of its own, however they are reached.

transformers draws from global generators, so candidates in threads of one process would not repeat. So each worker is a
process: one of this machine (``processes.py``), or one on a machine of a Ray cluster (``ray_actors.py``). Jobs and rows
travel by pickle.

A worker that dies is replaced, and what it had not sent is measured again; one that dies again before it has done a job
ends the search, unless its machine died.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from mergekit_lite.boosting.candidates.candidate import Job, Piece
from mergekit_lite.engine.processes import sendable
from mergekit_lite.errors import RunError

Measurer: TypeAlias = Callable[[Job], Iterator[Piece]]  # does a job
Maker: TypeAlias = AbstractContextManager[Measurer]  # sent to a worker, and entered there
DEATHS = 2  # of a worker, without a job done between them, end the search
STOP_SECONDS = 30.0  # that a worker without a job gets to stop its servers
MEMORY = "Usually that means that the memory ran out: fewer --parallel need less."


class Line(Protocol):
    """The line to one worker."""

    name: str  # of the worker, such as ``process 123``

    @property
    def machine_died(self) -> bool:
        """Whether its machine went with it, so that its end tells nothing of its job."""

    def give(self, job: Job) -> None:
        """Send a job, whether or not anybody is there to receive it."""

    def answers(self) -> Iterator[bytes]:
        """Yield what comes back, as of ``answers``, each pickled; it ends with the worker. Called in a thread."""

    def ask_to_stop(self) -> None:
        """Have a worker that has no job stop in order."""

    def end(self) -> str:
        """End the worker, once it has had its time to stop; return how it ended. What it sent is still answered."""


class Places(Protocol):
    """Where workers are started."""

    def free(self) -> int:
        """Return how many more workers could be started now."""

    def start(self, worker: int, maker: Maker) -> Line | None:
        """Start a worker; return None where it can't be."""


def answers(measure: Measurer, job: Job) -> Iterator[tuple[Piece | None, object]]:
    """Do a job, in a worker: yield each piece with None, and at last what it raised, as it can be sent, after None."""
    try:
        for piece in measure(job):
            yield piece, None
    except GeneratorExit:
        raise
    except BaseException as failure:
        yield None, sendable(failure)


@dataclass
class Workers:
    """The team; use it in ``with``. A worker is started with its first job."""

    makers: Sequence[Maker]  # one for each worker
    places: Places
    note: Callable[[str], None]  # is told of workers that are replaced
    _lines: dict[int, Line] = field(default_factory=dict, init=False)  # by worker
    _listeners: list[threading.Thread] = field(default_factory=list, init=False)
    _busy: set[int] = field(default_factory=set, init=False)
    _deaths: dict[int, int] = field(default_factory=dict, init=False)  # since the last job that was done
    # What was heard, of which worker, from which line: an answer, or None at the end of the line.
    _heard: queue.SimpleQueue[tuple[int, Line | None, bytes | None]] = field(
        default_factory=queue.SimpleQueue, init=False
    )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        """End all workers: those that have a job at once, the others in order."""
        for worker in self._lines.keys() - self._busy:
            self._lines[worker].ask_to_stop()
        for line in self._lines.values():
            line.end()
        for listener in self._listeners:
            listener.join(STOP_SECONDS)
        self._lines, self._listeners = {}, []

    @property
    def size(self) -> int:
        """The number of workers."""
        return len(self.makers)

    @property
    def workers(self) -> list[int]:
        """Those that can be given jobs: all that live, and of the others as many as there are places for.

        Raises:
            RunError: there is none.
        """
        others = [worker for worker in range(self.size) if worker not in self._lines]
        found = [*self._lines, *(others[: self.places.free()] if others else ())]
        if not found:
            raise RunError("No worker is left, and there is no place for another. What was measured is kept.")
        return sorted(found)

    def give(self, worker: int, job: Job) -> None:
        """Give a job to a worker that has none."""
        self._busy.add(worker)
        if worker not in self._lines:
            line = self.places.start(worker, self.makers[worker])
            if line is None:
                self._heard.put((worker, None, None))
                return
            self._lines[worker] = line
            self._listeners.append(threading.Thread(target=self._listen, args=(worker, line), daemon=True))
            self._listeners[-1].start()
        self._lines[worker].give(job)

    def _listen(self, worker: int, line: Line) -> None:
        try:
            for answer in line.answers():
                self._heard.put((worker, line, answer))
        finally:
            self._heard.put((worker, line, None))

    def next(self) -> tuple[int, Piece]:
        """Wait for a worker that has a job, and return what it sends.

        Raises:
            RunError: workers die.
            Exception: what a job raised.
        """
        while True:
            worker, line, answer = self._next_heard()
            if line is not self._lines.get(worker):
                continue  # of one that was replaced
            if answer is None:
                self._note_death(worker)
                if worker not in self._busy:
                    continue
                self._busy.remove(worker)
                return worker, Piece(ended=True, lost=True)
            piece, failure = pickle.loads(answer)
            if failure is not None:
                raise failure
            assert isinstance(piece, Piece)
            if piece.ended:
                self._busy.remove(worker)
                self._deaths.pop(worker, None)
            return worker, piece

    def _next_heard(self) -> tuple[int, Line | None, bytes | None]:
        while True:
            try:
                return self._heard.get(timeout=1.0)  # on Windows Ctrl-C has to wait for the end of a wait
            except queue.Empty:
                continue

    def _note_death(self, worker: int) -> None:
        """Forget a worker that died; the next job that it is given starts another. Raises RunError."""
        line = self._lines.pop(worker, None)
        if line is None:
            return
        how = f"Worker {worker + 1} of {self.size} ({line.name}) {line.end()}"
        self._deaths[worker] = self._deaths.get(worker, 0) + (not line.machine_died)
        if self._deaths[worker] >= DEATHS:
            raise RunError(f"{how}, and so did the one before it. What was measured is kept.")
        self.note(f"{how}. Another one takes its place.")
