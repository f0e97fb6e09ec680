"""What was fetched, kept on this disk up to a bound, where a command was asked to: statistics read tensors again.

Workers share it. Each file elsewhere has a sparse file, and a map with a byte for each grain that is there;
a grain is written first, then marked. How much there is, is the length of a file to which each grain adds a byte: that
is one step for all processes, so the bound is exceeded by a few blocks at most.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from mergekit_lite import positioned
from mergekit_lite.checkpoint.stores import ranges
from mergekit_lite.checkpoint.stores.private_folder import FETCHED, hold, let_go, private_folder
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile

GRAIN = 1 << 16  # bytes


class _Kept(NamedTuple):
    """What is kept of one file, as one process has it open."""

    content: BinaryIO
    grains: mmap.mmap


class Cache:
    """A folder with up to ``limit`` bytes of what was fetched."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._open: dict[tuple[int, RemoteFile], _Kept] = {}  # by process: a fork shares the place in an open file
        self._lock = threading.Lock()

    def fetch(self, file: RemoteFile, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes of a file from ``begin`` on, from here as far as they are here."""
        kept = self._kept(file)
        end = begin + len(out)
        numbers = range(begin // GRAIN, -(-end // GRAIN))
        for is_here, run in groupby(numbers, lambda number: kept.grains[number]):
            grains = list(run)
            first, last = max(begin, grains[0] * GRAIN), min(end, (grains[-1] + 1) * GRAIN)
            part = out[first - begin : last - begin]
            if is_here and positioned.read(kept.content.fileno(), part, first) == len(part):
                continue
            ranges.fetch(file, first, part)
            self._keep(file, kept, first, part)

    def _keep(self, file: RemoteFile, kept: _Kept, begin: int, data: memoryview) -> None:
        """Keep the whole grains of some bytes, while there is room; none any more once the disk is full."""
        end = begin + len(data)
        first, last = -(-begin // GRAIN), -(-end // GRAIN) if end == file.size else end // GRAIN
        used = self._folder / "used"
        if first >= last or (used.stat().st_size + last - first) * GRAIN > self._limit:
            return
        try:
            with used.open("ab", buffering=0) as counted:
                counted.write(b"." * (last - first))
            place, rest = first * GRAIN, data[first * GRAIN - begin : last * GRAIN - begin]
            while rest:
                written = positioned.write(kept.content.fileno(), rest, place)
                place, rest = place + written, rest[written:]
        except OSError:
            self._limit = 0
            return
        kept.grains[first:last] = b"\1" * (last - first)

    def _kept(self, file: RemoteFile) -> _Kept:
        key = os.getpid(), file
        with self._lock:
            if key not in self._open:
                name = xxhash.xxh3_128_hexdigest(f"{file.url} {file.size} {file.etag}".encode())
                descriptor = positioned.open_file(self._folder / f"{name}.bytes", os.O_RDWR | os.O_CREAT)
                content = os.fdopen(descriptor, "r+b", buffering=0)
                with (self._folder / f"{name}.grains").open("a+b") as grains:
                    # Zeros, not a hole: writing to what is mapped must not find the disk full.
                    grains.write(bytes(max(0, max(1, -(-file.size // GRAIN)) - grains.tell())))
                    grains.flush()
                    self._open[key] = _Kept(content, mmap.mmap(grains.fileno(), 0))
            return self._open[key]

    def close(self) -> None:
        """Close what this process has open, and remove all."""
        for (process, _), kept in self._open.items():
            if process == os.getpid():
                kept.content.close()
                kept.grains.close()
        self._open.clear()
        let_go(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)


_cache: Cache | None = None


@contextmanager
def caching(limit: int) -> Iterator[None]:
    """Keep up to ``limit`` bytes of what is fetched until the block ends; workers that are forked share it."""
    global _cache
    with private_folder() as home:
        folder = Path(tempfile.mkdtemp(prefix=FETCHED, dir=home))
        hold(folder)
    (folder / "used").touch()
    _cache = Cache(folder, limit)
    try:
        yield
    finally:
        _cache.close()
        _cache = None


def is_caching() -> bool:
    """Return whether what this process fetches is kept."""
    return _cache is not None


def fetch(file: RemoteFile, begin: int, out: memoryview) -> None:
    """Fill ``out`` with the bytes of a file from ``begin`` on as ``ranges.fetch``, by the cache if there is one."""
    if _cache is None:
        ranges.fetch(file, begin, out)
    else:
        _cache.fetch(file, begin, out)
