"""The workers of a run, each with buffers of its own, taking tasks from a common list."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from mergekit_lite import store_process
from mergekit_lite.c_library import c_function
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.stores.ranges import TRAFFIC, Traffic
from mergekit_lite.deferred import torch
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.processes import forked

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
MANY_FILES = 10_240  # the most that macOS allows a process
Task = TypeVar("Task")
Result = TypeVar("Result")
Do: TypeAlias = Callable[[WorkerBuffers, Reader, Task], Result]
Expect: TypeAlias = Callable[[Reader, Task], None]
Done: TypeAlias = "SimpleQueue[tuple[Result | None, BaseException | None]]"


class Crew(Protocol):
    """Workers elsewhere: those of a Ray cluster (``ray_workers.Cluster``).

    Attributes:
        on_news: called now and then while tasks are under way, with the bytes that were made of those not done yet.
    """

    on_news: Callable[[int], None] | None

    def run(
        self,
        tasks: Sequence[Task],
        worker: Callable[[], Callable[[Task], Result]],
        size: Callable[[Task], int] | None = None,
    ) -> Iterator[Result]:
        """Yield what ``worker()``, called by each worker, makes of each task; ``size`` returns the bytes it reads."""
        ...


@dataclass(frozen=True)
class Workers:
    """Who carries a plan out.

    Attributes:
        count: of the workers.
        devices: to compute on; the workers are spread over them.
        block: elements that each computes at once.
        processes: fork the workers instead of starting threads, where that is possible.
        crew: workers elsewhere, who do it instead.
    """

    count: int
    devices: Sequence[str]
    block: int
    processes: bool = False
    crew: Crew | None = None


class Pool:
    """Workers that do tasks until none is left, one fails, or the run is interrupted.

    Each has buffers of ``nbytes`` for ``inputs`` inputs and an output, and one of the ``devices``. A worker is a
    thread, or where ``processes`` is set a process of its own, which gets a copy of this one when the tasks begin: only
    what a task returns comes back. Workers of a ``crew`` get a copy by pickle.
    """

    def __init__(
        self,
        workers: int,
        devices: Sequence[str],
        inputs: int,
        nbytes: int,
        *,
        processes: bool = False,
        crew: Crew | None = None,
    ) -> None:
        self.workers = workers
        self.crew = crew
        self.processes = processes and hasattr(os, "fork") and workers > 1 and CPU in devices
        self._devices = devices
        self._room = (inputs, nbytes)
        self._stop = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_stop"} | {"crew": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _stop=threading.Event())

    @property
    def stopped(self) -> bool:
        """Whether long tasks should end now."""
        return self._stop.is_set()

    def run(
        self,
        tasks: Iterable[Task],
        do: Do[Task, Result],
        expect: Expect[Task] | None = None,
        *,
        size: Callable[[Task], int] | None = None,
    ) -> Iterator[Result]:
        """Do all tasks and yield what each one gives, as they get done. Raises what the first failing one raised.

        ``expect`` tells a worker's reader what a task will read, before the worker comes to it. ``size`` returns the
        bytes that a task reads: a crew begins with the largest.
        """
        tasks = list(tasks)
        store_process.end()  # what it found out is known; the workers need the memory
        if self.crew is not None:
            return self._counted(self.crew.run(tasks, lambda: _Worker(self._devices[0], self._room, do, expect), size))
        if self.processes and len(tasks) > 1:
            return self._counted(forked(self.workers, tasks, lambda: _Worker(CPU, self._room, do, expect)))
        return self._threaded(tasks, do, expect)

    def _counted(self, results: Iterator[tuple[Result, Traffic]]) -> Iterator[Result]:
        """Yield the results of processes, and count what they fetched as this one's."""
        for result, traffic in results:
            TRAFFIC.add(traffic)
            yield result

    def _threaded(self, tasks: Sequence[Task], do: Do[Task, Result], expect: Expect[Task] | None) -> Iterator[Result]:
        todo: SimpleQueue[Task] = SimpleQueue()
        for task in tasks:
            todo.put(task)
        done: Done[Result] = SimpleQueue()
        with Reader() as reader:
            devices = islice(cycle(self._devices), self.workers)
            threads = [threading.Thread(target=self._work, args=(on, reader, todo, done, do, expect)) for on in devices]
            for thread in threads:
                thread.start()
            try:
                for _ in tasks:
                    result, failure = done.get()
                    if failure is not None:
                        raise failure
                    yield result  # type: ignore[misc]  # None only where do gives it
            finally:  # also on Ctrl-C: the workers finish their chunk before the files under them are closed
                self._stop.set()
                for thread in threads:
                    thread.join()
                self._stop.clear()

    def _work(
        self,
        device: str,
        reader: Reader,
        todo: SimpleQueue[Task],
        done: Done[Result],
        do: Do[Task, Result],
        expect: Expect[Task] | None,
    ) -> None:
        try:
            buffers = WorkerBuffers(device, *self._room)
            with buffers.working():
                while not self._stop.is_set():
                    task = todo.get_nowait()
                    if expect is not None:
                        expect(reader, task)
                    done.put((do(buffers, reader, task), None))
        except Empty:
            return
        except BaseException as failure:
            done.put((None, failure))


class _Worker(Generic[Task, Result]):
    """What does the tasks of one process, and says what it fetched for each."""

    def __init__(self, device: str, room: tuple[int, int], do: Do[Task, Result], expect: Expect[Task] | None) -> None:
        self._buffers, self._reader = WorkerBuffers(device, *room), Reader()
        self._working = self._buffers.working()
        self._working.__enter__()  # until the process ends, which holds on to it
        self._do, self._expect = do, expect
        TRAFFIC.taken()  # what was counted before the fork is not this worker's

    def __call__(self, task: Task) -> tuple[Result, Traffic]:
        return self._do(self._buffers, self._reader, task), TRAFFIC.taken()

    def expect(self, task: Task) -> None:
        """Tell the reader what a task will read."""
        if self._expect is not None:
            self._expect(self._reader, task)


@contextmanager
def tuned_process(with_torch: bool = True) -> Iterator[None]:
    """Tune the process to its workers: freed memory kept, many files allowed, one thread for each call of torch.

    What planning freed is given back first.
    """
    _keep_freed_memory()
    _allow_many_files()
    if not with_torch:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the threads
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def writing_workers() -> int:
    """Return the number of workers for tasks that write: one more than cores, as one of them waits for the disk."""
    return available_cores() + 1


def _keep_freed_memory() -> None:
    """Let glibc reuse the temporaries of the arithmetic.

    By default it gives blocks over 128 KiB back to the system at once, and getting them again costs a page fault for
    every 4 KiB: with plain tensor expressions that is three quarters of the time (measured: 2.69 against 0.72 ns an
    element).
    """
    trim, set_option = c_function("malloc_trim"), c_function("mallopt")
    if trim is not None and set_option is not None:  # else it is another library's allocator
        trim(0)
        set_option(M_MMAP_THRESHOLD, 1 << 30)
        set_option(M_TRIM_THRESHOLD, 1 << 30)


def _allow_many_files() -> None:
    """Raise the limit of open files to what the system allows: many models of many shards are open at once."""
    try:
        import resource
    except ImportError:  # on Windows, which has no such limit
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for most in (hard, MANY_FILES):  # macOS may say that there is no limit, and refuse to set none
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return
