"""Workers as processes of their own, for the CPU on Linux.

A merge is hundreds of short torch calls a block, and between them a thread holds Python's lock: two threads spend a
quarter of their time on handing it over. Forked processes don't, and share all memory that nobody writes to. Python
counts references in the objects themselves, so a worker that looked at the plan would soon have a copy of it. That is
why all tasks are packed before the workers are forked: a worker is sent the number of a task, unpacks it from the
memory they all share, and sends back what the task made. Nothing else is shared but the files.

No worker outlives its parent. The system kills it with the parent, and one that started too late to be told by the
system finds that its parent is another, or that its connection has no other end.
"""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import traceback
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

from mergekit_lite.c_library import c_function
from mergekit_lite.errors import GOES_ON, MergekitLiteError, RunError, UsageError

AHEAD = 2  # tasks that a worker has been given besides the one it does, so that it never waits for the next
PR_SET_PDEATHSIG = 1
ADVICE = {  # by the signal that ended a worker
    "SIGKILL": "Usually that means that the memory ran out: fewer --threads need less.",
    "SIGTERM": "Somebody stopped it.",
    "SIGXCPU": "Its processor time ran out: raise the limit (ulimit -t).",
}
TO_START = {  # what else helps, by the error that keeps a worker from being started
    errno.EMFILE: "; or raise the limit of open files: ulimit -n 1024",
    errno.EAGAIN: "; or raise the limit of processes (ulimit -u)",
    errno.ENOMEM: "; or free some memory, or raise its limit (ulimit -v)",
}
CRASHED = "A library crashed in it: look for faulty memory or a faulty disk, and report it where it comes again."

Task = TypeVar("Task")
Result = TypeVar("Result")
Worker = Callable[[], Callable[[Task], Result]]  # made in each process: what does its tasks


@runtime_checkable
class LooksAhead(Protocol):
    """What does tasks and wants to know of each as soon as it is given, in their order."""

    def expect(self, task: Any) -> None:
        """Prepare for a task that comes after those that were said before."""


def forked(workers: int, tasks: Iterable[Task], worker: Worker[Task, Result]) -> Iterator[Result]:
    """Yield what ``worker()`` makes of each task, as they get done.

    Tasks and results travel by pickle.

    Raises:
        RunError: a process could not be started, ended early, or can't be reached.
        Exception: what the first failing task raised. The other processes are stopped.
    """
    return _done([packed(task) for task in tasks], workers, worker)


def packed(task: object) -> bytes:
    """Return a task as bytes: of many small tensors, whose names differ in a number, a sixth of what pickle makes."""
    return zlib.compress(pickle.dumps(task, pickle.HIGHEST_PROTOCOL), level=1)


def _done(packed: Sequence[bytes], workers: int, worker: Worker[Task, Result]) -> Iterator[Result]:
    """Yield what the workers make of each task."""
    numbers = iter(range(len(packed)))
    team: dict[Connection, _Process] = {}
    gc.freeze()  # searching what is there now for garbage would copy all its pages, here and in each worker
    try:
        for number in range(1, min(workers, len(packed)) + 1):
            process = _started(number, list(team), packed, worker)
            team[process.connection] = process
        for process in team.values():
            for task in islice(numbers, 1 + AHEAD):
                process.give(task)
        for _ in packed:
            process = team[_first_ready(list(team))]
            result = process.result()
            if (next_task := next(numbers, None)) is not None:
                process.give(next_task)
            yield result
    finally:
        for process in team.values():
            process.end()  # they only wait now; what is half done where one failed is not in the journal
        gc.unfreeze()


@dataclass
class _Process:
    """One worker, as its parent sees it: its number among the workers, and this end of the connection to it."""

    number: int
    pid: int
    connection: Connection
    status: int | None = None  # once it has ended; as ``os.waitstatus_to_exitcode`` gives it

    def give(self, task: int) -> None:
        """Send it the number of a task. Raises RunError."""
        try:
            self.connection.send(task)
        except ConnectionError:
            return  # it has ended: whoever waits for its result is told how
        except OSError as error:
            raise self._out_of_reach(error) from error

    def result(self) -> Any:
        """Receive what a task made. Raises what the task raised; RunError where the process has ended."""
        try:
            result, failure = self.connection.recv()
        except (EOFError, ConnectionError):
            raise RunError(f"Worker {self.number} (process {self.pid}) {self._how_it_ended()} {GOES_ON}") from None
        except OSError as error:
            raise self._out_of_reach(error) from error
        if failure is not None:
            raise failure
        return result

    def end(self) -> None:
        """End it, and wait until it is gone."""
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._wait()
        self.connection.close()

    def _wait(self) -> int:
        if self.status is None:
            self.status = 0
            with suppress(ChildProcessError):  # where SIGCHLD is ignored, the system keeps no status
                self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def _how_it_ended(self) -> str:
        """Say how it ended, and what to do."""
        status = self._wait()
        if status < 0:
            number = signal.Signals(-status)
            return f"was ended by {number.name} before its work was done. {ADVICE.get(number.name, CRASHED)}"
        if status == os.EX_IOERR:
            return "ended, as it could not send a result."
        return f"ended before its work was done{f' (exit status {status})' if status else ''}."

    def _out_of_reach(self, error: OSError) -> RunError:
        return RunError(f"Worker {self.number} (process {self.pid}) can't be reached: {error.strerror}. {GOES_ON}")


def _first_ready(connections: Sequence[Connection]) -> Connection:
    """Return a connection from which something can be read."""
    ready = wait(connections)[0]
    assert isinstance(ready, Connection)
    return ready


def _started(
    number: int, others: Sequence[Connection], packed: Sequence[bytes], worker: Worker[Task, Result]
) -> _Process:
    """Fork a worker. ``others`` are the parent's connections to earlier workers. Raises RunError."""
    parent = os.getpid()
    held = {signal.SIGINT, signal.SIGTERM}
    try:
        ours, theirs = Pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, held)  # a child that they hit would not know yet what to do
        try:
            with warnings.catch_warnings():  # the other threads, a progress bar's, hold nothing that a worker needs
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                _live(parent, before, [*others, ours], theirs, packed, worker)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except OSError as error:
        remedy = TO_START.get(error.errno or 0, "")
        raise RunError(
            f"Worker {number} can't be started: {error.strerror}. Fewer --threads need less{remedy}. {GOES_ON}"
        ) from error
    theirs.close()  # so that the end of the process ends the connection
    return _Process(number, pid, ours)


def _live(
    parent: int,
    signals: Iterable[int],
    not_ours: Iterable[Connection],
    connection: Connection,
    packed: Sequence[bytes],
    worker: Worker[Task, Result],
) -> NoReturn:
    """Be a worker until there is no parent; ``signals`` are those that are blocked outside of the fork."""
    status = os.EX_OK
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        if (prctl := c_function("prctl")) is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for other in not_ours:
            other.close()  # while a worker held the parent's end, the parent's end would not be noticed
        if os.getppid() == parent:
            _serve(connection, packed, worker)
    except OSError:
        status = os.EX_IOERR
    finally:
        os._exit(status)  # nothing of the parent's is tidied up


def _serve(connection: Connection, packed: Sequence[bytes], worker: Worker[Task, Result]) -> None:
    """Do tasks until the connection ends. Raises OSError where it breaks."""
    do: Callable[[Task], Result] | None = None
    waiting: deque[Task] = deque()
    while True:
        numbers: list[int] = []
        try:
            while not (waiting or numbers) or connection.poll():
                numbers.append(connection.recv())
        except (EOFError, ConnectionResetError):
            return
        try:
            do = do or worker()
            for number in numbers:
                waiting.append(pickle.loads(zlib.decompress(packed[number])))
                if isinstance(do, LooksAhead):
                    do.expect(waiting[-1])
            answer = pickle.dumps((do(waiting.popleft()), None))
        except BaseException as failure:
            answer = pickle.dumps((None, sendable(failure)))
        connection.send_bytes(answer)


def sendable(failure: BaseException) -> object:
    """Return what pickle makes a failure of again, caused by its traceback here where it is no error of this package.

    Where pickling loses the failure or its message, it is another one that says the same.
    """
    told = "".join(traceback.format_exception(failure))
    is_ours = isinstance(failure, MergekitLiteError)
    with suppress(Exception):
        if str(pickle.loads(pickle.dumps(failure))) == str(failure):
            return failure if is_ours else _Traced(failure, told)
    if is_ours:
        return (UsageError if isinstance(failure, UsageError) else RunError)(str(failure))
    return RuntimeError(f"in a worker:\n{told}")


class WorkerTraceback(Exception):
    """Where in a worker something was raised, as text: no traceback can be sent."""


class _Traced:
    """A failure with its traceback, which pickle makes the failure of."""

    def __init__(self, failure: BaseException, told: str) -> None:
        self._parts = failure, f"\n{told}"

    def __reduce__(self) -> tuple[Callable[[BaseException, str], BaseException], tuple[BaseException, str]]:
        return _caused, self._parts


def _caused(failure: BaseException, told: str) -> BaseException:
    failure.__cause__ = WorkerTraceback(told)
    return failure
