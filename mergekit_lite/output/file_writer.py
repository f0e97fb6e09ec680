"""One output file while it is written, at its final offsets, past the page cache where that is quicker.

What a page of the cache costs depends on the machine. Where the first touch of a free page waits for the host of a
virtual machine, 3 GB took 7.4 s to write and 12.5 s of processor time; past the cache 15 GB took 8.4 s and 0.8 s, as
the disk fetches the bytes by itself (two cores, writes of 2 MB). Where pages are cheap and the disk is slow it is the
other way round. So both ways are tried, and the one goes on that took less time lately. The bytes are the same.
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

PAGE = max(4096, mmap.PAGESIZE)  # what position, length and memory of a direct write are multiples of
SMALL = 1 << 18  # bytes; less is not worth the disk's attention
STAGE = 1 << 21  # bytes of a direct write
REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # by a file system that can't write directly
WAITING = 1 / 4  # of a second's worth when the processor is left to other workers
LATELY = 1 / 4  # weight of the newest time in the mean

_of_thread = threading.local()


class Target:
    """A file open for writing and reading back, from any thread and any process forked later."""

    def __init__(self, path: Path, size: int, pace: Pace) -> None:
        """Open the file, or make it, and take its room on the disk. Files on one disk share a pace. Raises OSError."""
        self._cached = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _reserve(self._cached, size)
        except OSError:
            os.close(self._cached)
            raise
        self._pace = pace
        self._direct = _opened_directly(path)
        if self._direct is None:
            pace.refused()

    def write(self, position: int, data: memoryview) -> None:
        """Put bytes in their place. Raises OSError."""
        if len(data) < SMALL:
            self._write_cached(position, data)
            return
        direct = self._pace.is_direct_next()
        started, worked = time.perf_counter(), time.thread_time()
        if direct:
            self._write_past_cache(position, data)
        else:
            self._write_cached(position, data)
        working = time.thread_time() - worked
        waiting = time.perf_counter() - started - working
        self._pace.took(direct, (working + WAITING * waiting) / len(data))

    def read(self, position: int, buffer: memoryview) -> bool:
        """Read back; False where it is not all there. Raises OSError."""
        return os.preadv(self._cached, [buffer], position) == len(buffer)

    def close(self) -> None:
        """Close the file."""
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def _write_cached(self, position: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._cached, data, position)
            position, data = position + written, data[written:]

    def _write_past_cache(self, position: int, data: memoryview) -> None:
        """Write the whole pages directly; those that are shared with other writes, and what is refused, as usual."""
        head = -position % PAGE
        self._write_cached(position, data[:head])
        position, data = position + head, data[head:]
        while count := min(len(data), STAGE) // PAGE * PAGE:
            written = self._write_pages(position, _on_pages(data[:count]))
            position, data = position + written, data[written:]
            if written < count:
                break
        self._write_cached(position, data)

    def _write_pages(self, position: int, pages: memoryview) -> int:
        assert self._direct is not None
        try:
            return os.pwrite(self._direct, pages, position)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            self._pace.refused()
            return 0


class Pace:
    """The seconds a byte that each way to write took lately, and so which way is next."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._seconds = {False: 0.0, True: 0.0}  # by whether it is the direct way; 0: not tried yet
        self._writes = 0

    def is_direct_next(self) -> bool:
        """The quicker way; at the 2nd, 4th, 8th … write since it became so, the other one, as times change."""
        self._writes += 1
        quicker = self._quicker()
        due = self._writes & (self._writes - 1) == 0 and self._writes > 1
        return not quicker if due and self._seconds[not quicker] < math.inf else quicker

    def took(self, direct: bool, seconds: float) -> None:
        """Note what a byte took."""
        quicker, before = self._quicker(), self._seconds[direct]
        self._seconds[direct] = LATELY * seconds + (1 - LATELY) * before if before else seconds
        if self._quicker() != quicker:
            self._writes = 0

    def refused(self) -> None:
        """Never try the direct way again."""
        self._seconds[True] = math.inf

    def _quicker(self) -> bool:
        return self._seconds[True] < self._seconds[False]


def _reserve(descriptor: int, size: int) -> None:
    """Give the file its size and room on the disk, so that a full disk shows before the work, and writing costs less.

    The room by the system call: the C library's stand-in for file systems that can't do it would write the whole file.
    """
    os.ftruncate(descriptor, size)
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "fallocate64") and libc.fallocate64(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))


def _opened_directly(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (AttributeError, OSError):  # of a system or a file system that can't
        return None


def _on_pages(data: memoryview) -> memoryview:
    """The same bytes in memory that begins at a page's begin, as a direct write wants it: as they are, or copied."""
    if data.readonly or ctypes.addressof(ctypes.c_char.from_buffer(data)) % PAGE:
        stage = _stage()[: len(data)]
        stage[:] = data
        return stage
    return data


def _stage() -> memoryview:
    """Memory of this thread for a copy."""
    stage: memoryview | None = getattr(_of_thread, "stage", None)
    if stage is None:
        stage = _of_thread.stage = memoryview(mmap.mmap(-1, STAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return stage
