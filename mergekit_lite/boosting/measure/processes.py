"""A team of processes on this machine, each with a model of its own.

transformers draws from global generators, so candidates in threads of one process would not repeat. Each worker is a
Python of its own (``worker.py``), which imports nothing of the user's main program. Jobs and rows travel by pickle over
a pair of sockets.

A worker that dies is replaced, and what it had not sent is measured again; one that dies again before it has done a job
ends the search. No worker outlives the team: it ends when its socket has no other end, and the system kills it with
this process.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from mergekit_lite.boosting.candidates.candidate import Job, Piece
from mergekit_lite.errors import RunError

Measurer = Callable[[Job], Iterator[Piece]]  # does a job
START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from mergekit_lite.boosting.measure.worker import main; main(int(sys.argv[1]))"
)
STOP_SECONDS = 30.0  # that a worker without a job gets to stop its servers
DEATHS = 2  # of a worker, without a job done between them, end the search
MEMORY = "Usually that means that the memory ran out: fewer --parallel need less."


@dataclass
class Processes:
    """Workers as processes; use it in ``with``."""

    makers: Sequence[AbstractContextManager[Measurer]]  # one for each worker; sent to it and entered there
    environments: Sequence[Mapping[str, str]]  # of each worker, beside this process's own
    note: Callable[[str], None]  # is told of workers that are replaced
    _workers: dict[int, _Process] = field(default_factory=dict, init=False)
    _deaths: dict[int, int] = field(default_factory=dict, init=False)  # since the last job that was done
    _lost: deque[int] = field(default_factory=deque, init=False)  # workers that died before their job reached them

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        """End all workers: those that have a job at once, the others in order."""
        for process in self._workers.values():
            process.ask_to_stop()
        for process in self._workers.values():
            process.end()
        self._workers = {}

    @property
    def size(self) -> int:
        """The number of workers."""
        return len(self.makers)

    def give(self, worker: int, job: Job) -> None:
        """Give a job to a worker that has none; its process is started with the first one."""
        if worker not in self._workers:
            self._workers[worker] = _Process(self.environments[worker])
            if not self._workers[worker].send(self.makers[worker]):
                self._lost.append(worker)
                return
        if not self._workers[worker].send(job):
            self._lost.append(worker)
        self._workers[worker].busy = True

    def next(self) -> tuple[int, Piece]:
        """Wait for a worker that has a job, and return what it sends.

        Raises:
            RunError: workers die.
            Exception: what a job raised.
        """
        if self._lost:
            return self._died(self._lost.popleft())
        by_connection = {process.connection: worker for worker, process in self._workers.items() if process.busy}
        ready = wait(list(by_connection))[0]
        assert isinstance(ready, Connection)
        worker = by_connection[ready]
        try:
            piece, failure = pickle.loads(ready.recv_bytes())
        except (EOFError, OSError):
            return self._died(worker)
        if failure is not None:
            raise failure
        assert isinstance(piece, Piece)
        if piece.ended:
            self._workers[worker].busy = False
            self._deaths.pop(worker, None)
        return worker, piece

    def _died(self, worker: int) -> tuple[int, Piece]:
        """Return that a worker's job is lost; the next one that it is given starts another process."""
        process = self._workers.pop(worker)
        how = f"Worker {worker + 1} of {self.size} (process {process.pid}) {process.how_it_ended()}"
        self._deaths[worker] = self._deaths.get(worker, 0) + 1
        if self._deaths[worker] >= DEATHS:
            raise RunError(f"{how}, and so did the one before it. What was measured is kept.")
        self.note(f"{how}. Another one takes its place.")
        return worker, Piece(ended=True, lost=True)


class _Process:
    """One worker, as its parent sees it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=2,  # this process's own output has the result alone
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
            )
        self.connection = Connection(ours.detach())
        self.pid = self._process.pid
        self.busy = False

    def send(self, what: object) -> bool:
        """Send something, and return whether there is somebody to receive it."""
        try:
            self.connection.send(what)
        except OSError:
            return False
        return True

    def ask_to_stop(self) -> None:
        self.connection.close()

    def end(self) -> None:
        """Wait until it is gone."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def how_it_ended(self) -> str:
        self.connection.close()
        self.end()
        code = self._process.returncode
        if code >= 0:
            return f"ended with exit code {code}"
        advice = f". {MEMORY}" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{advice}".rstrip(".")
