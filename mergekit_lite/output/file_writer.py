"""Writer of one output file, at final offsets, past the page cache where that is quicker.

What a page of the cache costs depends on the machine. Where the first touch of a free page waits for the host of a
virtual machine, 3 GB took 7.4 s to write and 12.5 s of processor time; past the cache 15 GB took 8.4 s and 0.8 s, as
the disk fetches the bytes by itself (two cores, writes of 2 MB). Where pages are cheap and the disk is slow, writing
through the cache is quicker. So both are tried, and the one that took less time lately is used. The bytes are the same.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import threading
import time
from pathlib import Path

from mergekit_lite import positioned
from mergekit_lite.c_library import c_function
from mergekit_lite.output.working_folder import open_own

PAGE = max(4096, mmap.PAGESIZE)  # bytes; position, length and memory of a direct write are multiples of it
MIN_DIRECT = 1 << 18  # bytes; smaller writes go through the cache
DIRECT_WRITE = 1 << 21  # most bytes of one direct write
NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # errors of a file system that can't write directly
FILLED_WAIT = 1 / 4  # what a second of waiting weighs that leaves the processor to other workers
NEWEST_WEIGHT = 1 / 4  # of the newest time in the running mean

_of_thread = threading.local()


class FileWriter:
    """A file open for writing and reading back, from any thread and any process forked later.

    It is created where there is none, and room for all its bytes reserved; ``times`` are shared by all files on a disk.
    Raises OSError where the disk is full, or the file can't be opened, RunError for links and irregular files.
    """

    def __init__(self, path: Path, size: int | None, times: WriteTimes, *, shared: bool = False) -> None:
        """Open it; ``size`` None says that it is there already, ``shared`` that other machines write to it too.

        What is written to a shared file is with its server before the write returns. So nothing that is reported as
        written dies with this machine; and a client of NFS sends the very bytes, where it would otherwise send the
        whole page with what it last knew of bytes that others write.
        """
        durable = os.O_DSYNC if shared else 0
        self._cached = open_own(path, os.O_RDWR | durable | (os.O_CREAT if size is not None else 0))
        try:
            if size is not None:
                reserve(self._cached, size)
        except OSError:
            os.close(self._cached)
            raise
        self._times = times
        self._direct = _opened_directly(path, durable)
        if self._direct is None:
            times.never_direct()

    def write(self, position: int, data: memoryview) -> None:
        """Write ``data`` at ``position``. Raises OSError."""
        if len(data) < MIN_DIRECT:
            self._write_cached(position, data)
            return
        direct = self._times.choose_direct()
        started, worked = time.perf_counter(), time.thread_time()
        write = self._write_past_cache if direct else self._write_cached
        write(position, data)
        working = time.thread_time() - worked
        waiting = time.perf_counter() - started - working
        self._times.record(direct, (working + self._times.waiting_weight * waiting) / len(data))

    def read(self, position: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` from ``position`` on; return False where the file ends before. Raises OSError."""
        return positioned.read(self._cached, buffer, position) == len(buffer)

    def flush(self) -> None:
        """Bring what was written to the disk, or to its server. Raises OSError."""
        os.fsync(self._cached)

    def close(self) -> None:
        """Close the file."""
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def _write_cached(self, position: int, data: memoryview) -> None:
        while data:
            written = positioned.write(self._cached, data, position)
            position, data = position + written, data[written:]

    def _write_past_cache(self, position: int, data: memoryview) -> None:
        """Write whole pages directly; the ends, whose pages other writes share, and refused pages through the cache."""
        head = -position % PAGE
        self._write_cached(position, data[:head])
        position, data = position + head, data[head:]
        while count := min(len(data), DIRECT_WRITE) // PAGE * PAGE:
            written = self._write_pages(position, _on_pages(data[:count]))
            position, data = position + written, data[written:]
            if written < count:
                break
        self._write_cached(position, data)

    def _write_pages(self, position: int, pages: memoryview) -> int:
        assert self._direct is not None
        try:
            return positioned.write(self._direct, pages, position)
        except OSError as error:
            if error.errno not in NOT_DIRECT:
                raise
            self._times.never_direct()
            return 0


def waiting_weight(workers: int, cores: int) -> float:
    """Return what a second of waiting weighs: a whole one, unless there is a worker too many who works meanwhile."""
    return FILLED_WAIT if workers > cores else 1.0


class WriteTimes:
    """Recent seconds per byte of direct and of cached writes, by which the next way to write is chosen.

    Attributes:
        waiting_weight: what a second counts in which the processor is left to others.
    """

    def __init__(self) -> None:
        self.waiting_weight = FILLED_WAIT
        self._seconds = {False: 0.0, True: 0.0}  # per byte; of cached writes and of direct ones; 0: not tried yet
        self._writes = 0

    def choose_direct(self) -> bool:
        """Choose the quicker way; at its 2nd, 4th, 8th … write the other one, as times change. True is direct."""
        self._writes += 1
        quicker = self._quicker()
        due = self._writes & (self._writes - 1) == 0 and self._writes > 1
        return not quicker if due and self._seconds[not quicker] < math.inf else quicker

    def record(self, direct: bool, seconds: float) -> None:
        """Add the seconds per byte of a write to the running mean."""
        quicker, before = self._quicker(), self._seconds[direct]
        self._seconds[direct] = NEWEST_WEIGHT * seconds + (1 - NEWEST_WEIGHT) * before if before else seconds
        if self._quicker() != quicker:
            self._writes = 0

    def never_direct(self) -> None:
        """Rule out direct writes."""
        self._seconds[True] = math.inf

    def _quicker(self) -> bool:
        return self._seconds[True] < self._seconds[False]


def reserve(descriptor: int, size: int) -> None:
    """Give the file its size and room on the disk, so that a full disk shows before the work, and writing costs less.

    The system call is used: on file systems that can't do it the C library would write the whole file instead.
    """
    os.ftruncate(descriptor, size)
    fallocate = c_function("fallocate64")
    if fallocate is not None and fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))


def _opened_directly(path: Path, durable: int) -> int | None:
    try:
        return os.open(path, durable | os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (AttributeError, OSError):  # the system or the file system can't do it
        return None


def _on_pages(data: memoryview) -> memoryview:
    """Return the bytes in memory that starts at a page, as a direct write needs: themselves, or a copy."""
    if data.readonly or ctypes.addressof(ctypes.c_char.from_buffer(data)) % PAGE:
        stage = _stage()[: len(data)]
        stage[:] = data
        return stage
    return data


def _stage() -> memoryview:
    """Return this thread's memory for such copies."""
    stage: memoryview | None = getattr(_of_thread, "stage", None)
    if stage is None:
        stage = _of_thread.stage = positioned.pages(DIRECT_WRITE)
    return stage
