"""The machines of a prediction: given by the user, or this one, as it is found."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mergekit_lite.engine.pool import available_cores
from mergekit_lite.output.file_writer import FILLED_WAIT

SCRATCH = 1 << 26  # bytes that are written and read back to measure a disk
PIECE = 1 << 21
LONGEST = 0.2  # seconds for each of the four ways
COPY_IN, COPY_OUT = 0.2e-9, 0.3e-9  # seconds of processor time a byte, from and to the page cache (measured)
OVER_NET = 1e-9  # likewise, of a byte that comes or goes over TLS; an estimate
DIRTY_SHARE = 0.15  # of the free memory: written pages beyond it wait for the disk (Linux: between 10 and 20 %)
LOOKS = 64  # at pages of each input file


@dataclass(frozen=True)
class Cluster:
    """Some machines that are alike, or this one.

    Attributes:
        cores: of each node.
        nodes: how many there are.
        read, write: bytes a second that the disk under the models gives to a node, and takes from it; infinite where
            it doesn't limit.
        net: bytes a second of each node's connection, each way; None where models are on the nodes' own disks.
        is_shared: with ``net``, whether the models lie in a shared file system, whose pages a node caches; else in an
            object store.
        copy_in, copy_out: seconds of processor time for a byte that is read, and for one that is written.
        write_wait: seconds that a worker waits for a byte that it writes.
        buffered: bytes of output that the page cache takes before writing waits for the disk.
        free_memory: bytes that the page cache may take.
        is_measured: whether this is the machine that it was measured on.
    """

    cores: int
    nodes: int = 1
    read: float = math.inf
    write: float = math.inf
    net: float | None = None
    is_shared: bool = False
    copy_in: float = COPY_IN
    copy_out: float = COPY_OUT
    write_wait: float = 0.0
    buffered: float = 0.0
    free_memory: float = 0.0
    is_measured: bool = False


def this_cluster(output: Path) -> Cluster:
    """Return this machine: its cores, and what the disk under an output does in a fraction of a second.

    What is written for that has no name in the file system and is gone at once, also where the process is killed.
    Where nothing can be written, usual times stand for measured ones.
    """
    cores = available_cores()
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as scratch:
            return _measured(cores, scratch)
    except (OSError, AttributeError):  # nothing can be written there, or not at positions
        return Cluster(cores)


def _measured(cores: int, scratch: IO[bytes]) -> Cluster:
    piece = memoryview(mmap.mmap(-1, PIECE))
    piece[:] = os.urandom(1 << 12) * (PIECE >> 12)
    descriptor = scratch.fileno()
    to_cache = _timed(lambda place: os.pwrite(descriptor, piece, place))
    from_cache = _timed(lambda place: os.preadv(descriptor, [piece], place), to_cache.nbytes)
    through_cache = Cluster(cores, copy_in=from_cache.working, copy_out=to_cache.working, is_measured=True)
    past = _opened_directly(descriptor)
    if past is None:
        return through_cache
    try:
        to_disk = _timed(lambda place: os.pwrite(past, piece, place))
        from_disk = _timed(lambda place: os.preadv(past, [piece], place), to_disk.nbytes)
    except OSError:
        return through_cache
    finally:
        os.close(past)
    direct = to_disk.cost < to_cache.cost  # as ``FileWriter`` chooses
    way = to_disk if direct else to_cache
    free_memory = _free_memory()
    return Cluster(
        cores,
        read=1 / from_disk.elapsed,
        write=1 / to_disk.elapsed,
        copy_in=from_cache.working,
        copy_out=way.working,
        write_wait=way.waiting,
        buffered=0.0 if direct else DIRTY_SHARE * free_memory,
        free_memory=free_memory,
        is_measured=True,
    )


@dataclass(frozen=True)
class _Way:
    """A way to write or read: seconds a byte of work and of waiting, and how many bytes it was tried with."""

    working: float
    waiting: float
    nbytes: int

    @property
    def elapsed(self) -> float:
        return self.working + self.waiting

    @property
    def cost(self) -> float:
        return self.working + FILLED_WAIT * self.waiting


def _timed(move: Callable[[int], int], most: int = SCRATCH) -> _Way:
    """Time a move of pieces at one place after another, until there are enough of them or it takes too long."""
    started, worked, moved = time.perf_counter(), time.thread_time(), 0
    while moved == 0 or (moved < most and time.perf_counter() - started < LONGEST):
        moved += move(moved)
    working = time.thread_time() - worked
    return _Way(working / moved, max(0.0, time.perf_counter() - started - working) / moved, moved)


def _opened_directly(descriptor: int) -> int | None:
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except (AttributeError, OSError):  # the system or the file system can't do it
        return None


def _free_memory() -> float:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    return 0.0


def cached_share(files: Iterable[tuple[Path, int]]) -> float:
    """Return the share of some files' bytes that are in the page cache, by a look at some pages of each.

    A look brings nothing there. 0 where the system can't tell.
    """
    cached = total = 0.0
    for path, size in files:
        total += size
        with suppress(OSError, AttributeError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                places = range(0, size, max(1, size // LOOKS))
                cached += size * sum(_is_cached(descriptor, place) for place in places) / len(places)
            finally:
                os.close(descriptor)
    return cached / total if total else 0.0


def _is_cached(descriptor: int, place: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
