"""Reads and writes at a place of an open file, and memory for them, by whatever calls the system has.

Most systems read and write at a place in one call, into the caller's memory, and any number of threads at once. Where
Python has no such call, as on Windows, the place is set first: the threads that share a descriptor take turns.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

READS_AT, WRITES_AT = hasattr(os, "preadv"), hasattr(os, "pwrite")
# Windows would else turn line ends into its own. Opening a pipe or a terminal must neither wait nor take it over.
AS_BYTES = sum(getattr(os, name, 0) for name in ("O_BINARY", "O_NONBLOCK", "O_NOCTTY"))
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}

_turns: dict[int, threading.Lock] = {}  # by descriptor


def open_file(path: Path, flags: int, *, links: bool = True) -> int:
    """Open a file as bytes, and return its descriptor; child processes don't get it.

    Args:
        path: the file.
        flags: of ``os.open``.
        links: whether the last part of the path may be a link.

    Raises:
        OSError: the system refuses; with ``ELOOP`` for a link that isn't to be followed.
    """
    if links:
        return os.open(path, flags | AS_BYTES, 0o644)
    if not NO_LINKS and (path.is_symlink() or getattr(os.path, "isjunction", os.path.islink)(path)):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.open(path, flags | AS_BYTES | NO_LINKS, 0o644)


def read(descriptor: int, buffer: memoryview, position: int) -> int:
    """Read into ``buffer`` from a place of a file; return how many bytes came, 0 at its end. Raises OSError."""
    if READS_AT:
        return os.preadv(descriptor, [buffer], position)
    with _turn(descriptor):
        os.lseek(descriptor, position, os.SEEK_SET)
        return io.FileIO(descriptor, closefd=False).readinto(buffer)


def read_whole(descriptor: int, parts: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
    """Read into several buffers, each given with its place in a file; yield what of them didn't come, if anything.

    There may be many, and short ones: each takes one call of the system, and nothing else that could be saved.
    """
    if not READS_AT:
        yield from parts
        return
    call = os.preadv
    for position, buffer in parts:
        try:
            count = call(descriptor, (buffer,), position)
        except OSError:
            count = 0
        if count < len(buffer):
            yield position + count, buffer[count:]


def read_bytes(descriptor: int, count: int, position: int) -> bytes:
    """Return ``count`` bytes from a place of a file, or those up to its end. Raises OSError."""
    buffer = bytearray(count)
    return bytes(buffer[: read(descriptor, memoryview(buffer), position)])


def write(descriptor: int, data: memoryview, position: int) -> int:
    """Write at a place of a file; return how many bytes the system took. Raises OSError."""
    if WRITES_AT:
        return os.pwrite(descriptor, data, position)
    with _turn(descriptor):
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, data)


def pages(nbytes: int) -> memoryview:
    """Return memory of this process alone; it begins where a page begins."""
    return memoryview(mmap.mmap(-1, nbytes, **PRIVATE))


def _turn(descriptor: int) -> threading.Lock:
    """Return the lock of a descriptor; a number that comes again may have that of the file before."""
    return _turns.setdefault(descriptor, threading.Lock())
