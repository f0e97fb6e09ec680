"""Spool of a shard on its way to an object store: a sparse file without a name, given back as far as it is sent.

As it has no name, no kill leaves it behind. Bytes are written at their final offsets, as to any output file, by any
process that was forked from the one that made it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from pathlib import Path

from mergekit_lite import positioned
from mergekit_lite.c_library import c_function
from mergekit_lite.output.file_writer import PAGE

KEEP_SIZE, PUNCH_HOLE = 1, 2  # flags of Linux's fallocate


class Spool:
    """A nameless file in a folder. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._released = 0

    def write(self, position: int, data: memoryview) -> None:
        """Write ``data`` at ``position``. Raises OSError."""
        while data:
            written = positioned.write(self._file.fileno(), data, position)
            position, data = position + written, data[written:]

    def read(self, position: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` from ``position`` on; return False where the file ends before. Raises OSError."""
        return positioned.read(self._file.fileno(), buffer, position) == len(buffer)

    def release(self, end: int) -> None:
        """Give the disk back what lies before ``end``, as far as the system can: Linux does it page by page."""
        end -= end % PAGE
        fallocate = c_function("fallocate64")
        if end <= self._released or fallocate is None:
            return
        first, count = ctypes.c_int64(self._released), ctypes.c_int64(end - self._released)
        if fallocate(self._file.fileno(), KEEP_SIZE | PUNCH_HOLE, first, count) == 0:
            self._released = end
        elif ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on the disk."""
        return os.fstat(self._file.fileno()).st_blocks * 512

    def clear(self) -> None:
        """Give all of it back."""
        os.ftruncate(self._file.fileno(), 0)

    def close(self) -> None:
        """Close it, and so give all of it back."""
        self._file.close()
