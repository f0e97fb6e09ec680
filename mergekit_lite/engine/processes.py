"""Workers as processes of their own, for the CPU on Linux.

A merge is hundreds of short torch calls a block, and between them a thread holds Python's lock: two threads spend a
quarter of their time on handing it over. Forked processes don't, and share all memory that they don't write to. Each
is given the numbers of its tasks and sends back what they made; nothing else is shared but the files.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from mergekit_lite.errors import RunError

AHEAD = 2  # tasks that a worker has been given besides the one it does, so that it never waits for the next
PR_SET_PDEATHSIG = 1

Task = TypeVar("Task")
Result = TypeVar("Result")
Worker = Callable[[], Callable[[Task], Result]]  # made in each process: what does its tasks


def forked(workers: int, tasks: Sequence[Task], worker: Worker[Task, Result]) -> Iterator[Result]:
    """Yield what ``worker()`` makes of each task, as they get done.

    Raises:
        RunError: a process was killed.
        Exception: what the first failing task raised. The other processes are stopped.
    """
    processes: dict[Connection, ForkProcess] = {}
    todo = iter(range(len(tasks)))
    left = len(tasks)
    try:
        for _ in range(min(workers, left)):
            connection, process = _started(tasks, worker)
            processes[connection] = process
            for first in islice(todo, 1 + AHEAD):
                connection.send(first)
        while left:
            for ready in wait(list(processes)):
                assert isinstance(ready, Connection)
                result = _received(ready, processes[ready])
                if (number := next(todo, None)) is not None:
                    with suppress(ConnectionError):  # of a process that was killed meanwhile: the next look tells
                        ready.send(number)
                left -= 1
                yield result
    finally:
        for connection, process in processes.items():
            process.kill()  # at the end they only wait; what is half done when one fails is not in the journal
            process.join()
            connection.close()


def _started(tasks: Sequence[Task], worker: Worker[Task, Result]) -> tuple[Connection, ForkProcess]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, tasks, worker), daemon=True)
    with warnings.catch_warnings():  # the other threads, a progress bar's, hold nothing that a worker needs
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()  # so that the end of the process ends the connection
    return ours, process


def _received(connection: Connection, process: ForkProcess) -> Any:
    try:
        result, failure = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        code = process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise RunError(
            f"A worker process ended before its work was done ({name}). SIGKILL usually means that the memory ran out: "
            "fewer --threads need less. A command that takes --resume goes on with what was finished."
        ) from None
    if failure is not None:
        raise failure
    return result


def _serve(connection: Connection, tasks: Sequence[Task], worker: Worker[Task, Result]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nor do they outlive it
    gc.freeze()  # what was there before stays: searching it for garbage would copy all its pages into this process
    try:
        do = worker()
        while True:
            connection.send((do(tasks[connection.recv()]), None))
    except EOFError:
        return
    except BaseException as failure:
        connection.send((None, failure))
