"""The process of a worker: does the jobs that come by its standard input, and ends with it.

The process that started it may die in any way: then the input ends, and the system sends SIGKILL where it can. A worker
in the middle of a job ends at once, and its servers with it (``answers/watchdog.py``); else it ends in order.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import threading
from contextlib import suppress
from typing import IO, Any, NoReturn

from mergekit_lite.boosting.measure.workers import answers
from mergekit_lite.c_library import c_function
from mergekit_lite.engine.processes import sendable

PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    """Be a worker until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    jobs, results = _taken(0, "rb", os.open(os.devnull, os.O_RDONLY)), _taken(1, "wb", 2)
    if (prctl := c_function("prctl")) is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    at_work = threading.Event()
    threading.Thread(target=_receive, args=(jobs, received, at_work), daemon=True).start()
    try:
        maker = received.get()
        if isinstance(maker, BaseException):
            raise maker
        if maker is not None:
            with maker as measure:
                while (job := received.get()) is not None:
                    if isinstance(job, BaseException):
                        raise job
                    for piece, failure in answers(measure, job):
                        if piece is None or piece.ended:
                            at_work.clear()
                        _send(results, piece, failure)
    except BaseException as failure:
        with suppress(OSError):
            _send(results, None, sendable(failure))
    os._exit(0)  # tearing torch down takes a while and frees nothing


def _taken(number: int, mode: str, instead: int) -> IO[bytes]:
    """Return a standard stream for our own use: what else reads or writes there meets another one ``instead``."""
    ours: IO[bytes] = os.fdopen(os.dup(number), mode)
    os.dup2(instead, number)
    return ours


def _send(results: IO[bytes], *answer: object) -> None:
    """Send an answer, packed twice as jobs are."""
    pickle.dump(pickle.dumps(answer), results)
    results.flush()


def _receive(jobs: IO[bytes], received: queue.SimpleQueue[Any], at_work: threading.Event) -> None:
    """Pass on what comes: first what makes the function that does jobs, then jobs, None at the end."""
    while True:
        try:
            packed = pickle.load(jobs)
        except (EOFError, OSError, pickle.UnpicklingError):
            if at_work.is_set():
                os._exit(1)
            received.put(None)
            return
        at_work.set()
        try:
            received.put(pickle.loads(packed))
        except BaseException as failure:  # it can't be unpacked here
            received.put(failure)
