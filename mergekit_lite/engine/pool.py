"""The workers of a run, each with buffers of its own, taking tasks from a common list."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from queue import Empty, SimpleQueue
from typing import TypeAlias, TypeVar

from mergekit_lite.c_library import c_function
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.deferred import torch
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.processes import forked

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
MANY_FILES = 10_240  # the most that macOS allows a process
Task = TypeVar("Task")
Result = TypeVar("Result")
Do: TypeAlias = Callable[[WorkerBuffers, Reader, Task], Result]
Done: TypeAlias = "SimpleQueue[tuple[Result | None, BaseException | None]]"


@dataclass(frozen=True)
class Workers:
    """Who carries a plan out.

    Attributes:
        count: of the workers.
        devices: to compute on; the workers are spread over them.
        block: elements that each computes at once.
        processes: fork the workers instead of starting threads, where that is possible.
    """

    count: int
    devices: Sequence[str]
    block: int
    processes: bool = False


class Pool:
    """Workers that do tasks until none is left, one fails, or the run is interrupted.

    Each has buffers of ``nbytes`` for ``inputs`` inputs and an output, and one of the ``devices``. A worker is a
    thread, or where ``processes`` is set a process of its own, which gets a copy of this one when the tasks begin: only
    what a task returns comes back.
    """

    def __init__(
        self, workers: int, devices: Sequence[str], inputs: int, nbytes: int, *, processes: bool = False
    ) -> None:
        self.workers = workers
        self.processes = processes and hasattr(os, "fork") and workers > 1 and CPU in devices
        self._devices = devices
        self._room = (inputs, nbytes)
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether long tasks should end now."""
        return self._stop.is_set()

    def run(self, tasks: Iterable[Task], do: Do[Task, Result]) -> Iterator[Result]:
        """Do all tasks and yield what each one gives, as they get done. Raises what the first failing one raised."""
        tasks = list(tasks)
        if self.processes and len(tasks) > 1:
            return forked(self.workers, tasks, lambda: self._worker(do))
        return self._threaded(tasks, do)

    def _worker(self, do: Do[Task, Result]) -> Callable[[Task], Result]:
        """Return what does the tasks of one process."""
        buffers, reader = WorkerBuffers(CPU, *self._room), Reader()

        return lambda task: do(buffers, reader, task)

    def _threaded(self, tasks: Sequence[Task], do: Do[Task, Result]) -> Iterator[Result]:
        todo: SimpleQueue[Task] = SimpleQueue()
        for task in tasks:
            todo.put(task)
        done: Done[Result] = SimpleQueue()
        with Reader() as reader:
            devices = islice(cycle(self._devices), self.workers)
            threads = [threading.Thread(target=self._work, args=(on, reader, todo, done, do)) for on in devices]
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
        self, device: str, reader: Reader, todo: SimpleQueue[Task], done: Done[Result], do: Do[Task, Result]
    ) -> None:
        try:
            buffers = WorkerBuffers(device, *self._room)
            with buffers.working():
                while not self._stop.is_set():
                    done.put((do(buffers, reader, todo.get_nowait()), None))
        except Empty:
            return
        except BaseException as failure:
            done.put((None, failure))


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
