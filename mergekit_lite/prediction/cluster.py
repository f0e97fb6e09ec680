"""The machines of a prediction: given by the user, or this one, as it is found."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import IO, Any, NamedTuple

from mergekit_lite.engine.pool import available_cores
from mergekit_lite.output.file_writer import reserve, waiting_weight

SCRATCH = 1 << 26  # bytes that are written and read back to measure a disk, and as many past the page cache
MORE = 1 << 29  # bytes that are written at most to see how far the memory reaches that the system has at hand
PIECE = 1 << 21
PIECES = 4  # in turn, as a worker has inputs and a result: one alone would stay in the processor's caches
HOST = 2.0  # times as long a write takes, at least, whose pages come from the host of a virtual machine
FEWEST = 8  # pieces one after another that show it: a single one may have waited for something else
MOST_CROWDED = 3.0  # times as long; beyond that something else disturbed the measurement
LONGEST = 0.4  # seconds for writing, and for reading
FETCH, COPY_IN, COPY_AGAIN, COPY_OUT = 0.6e-9, 0.25e-9, 0.13e-9, 0.25e-9  # seconds of processor time a byte: from the
# disk by way of the page cache, from there, while it is in the processor's caches, and to the page cache (measured)
OVER_NET = 1e-9  # likewise, of a byte that comes or goes over TLS; an estimate
DIRTY_SHARE = 0.15  # of the free memory: written pages beyond it wait for the disk (Linux: between 10 and 20 %)
LOOKS = 64  # at pages of each input file
COPIED = 1 << 26  # bytes of the inputs that are copied from the cache, to see what that takes


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
        fetch, copy_in, copy_again, copy_out: seconds of processor time for a byte that the disk gives, for one that the
            page cache has, for one that was read just now, and for one that is written.
        crowding: how many times as long those bytes take while each core moves some.
        at_hand: bytes that the page cache takes of memory that the system has.
        from_host: seconds more for a byte beyond them, where a virtual machine gets its memory from its host: when it
            uses it for the first time, or when it had given it back.
        past_cache: what writing past the page cache takes, where that is possible.
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
    fetch: float = FETCH
    copy_in: float = COPY_IN
    copy_again: float = COPY_AGAIN
    copy_out: float = COPY_OUT
    crowding: float = 1.0
    at_hand: float = math.inf
    from_host: float = 0.0
    past_cache: Way | None = None
    write_wait: float = 0.0
    buffered: float = 0.0
    free_memory: float = 0.0
    is_measured: bool = False

    def met_by(self, workers: int, nbytes: int) -> Cluster:
        """Return it as a run finds it whose workers on each node write ``nbytes``.

        They share its memory: one alone moves bytes as it was measured. They write as ``FileWriter`` chooses, and pages
        of the cache beyond those at hand may cost more than writing past it.
        """
        weight = waiting_weight(workers, self.cores)
        here = replace(self, crowding=self.crowding if min(workers, self.cores) > 1 else 1.0)
        ways = [Way(self.copy_out, self.write_wait), Way(self.copy_out + self.from_host, self.write_wait)]
        chosen = [min(way, self.past_cache or way, key=lambda way: way.cost(weight)) for way in ways]
        near = min(1.0, self.at_hand / nbytes) if nbytes else 1.0
        shares = near, 1 - near
        in_cache = sum(share for share, way in zip(shares, chosen, strict=True) if way is not self.past_cache)
        working, waiting = (near * first + (1 - near) * further for first, further in zip(*chosen, strict=True))
        return replace(
            here,
            fetch=self.fetch * here.crowding,
            copy_in=self.copy_in * here.crowding,
            copy_again=self.copy_again * here.crowding,
            copy_out=working * here.crowding,
            write_wait=waiting,
            buffered=min(self.buffered, in_cache * nbytes),
        )


class Way(NamedTuple):
    """A way to write or read: seconds a byte of work and of waiting."""

    working: float
    waiting: float

    @property
    def elapsed(self) -> float:
        """Both."""
        return self.working + self.waiting

    def cost(self, waiting_weight: float) -> float:
        """Return what a byte costs, where a second of waiting weighs as much."""
        return self.working + waiting_weight * self.waiting


def this_cluster(output: Path, workers: int | None = None) -> Cluster:
    """Return this machine: its cores, and what the disk under an output does in a fraction of a second.

    Readers at once are measured as ``workers`` will be, by default one more than cores, but no more than cores.

    What is written for that has no name in the file system and is gone at once, also where the process is killed.
    Where nothing can be written, usual times stand for measured ones.
    """
    cores = available_cores()
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as scratch:
            return _measured(cores, workers or cores + 1, scratch)
    except (OSError, AttributeError):  # nothing can be written there, or not at positions
        return Cluster(cores)


def _measured(cores: int, workers: int, scratch: IO[bytes]) -> Cluster:
    """Measure a disk by a file without a name, with writes like those of a run, in turns through the cache and past it.

    What was written through the cache is read from there, the rest from the disk, as runs read it. Of writes the median
    counts: a piece that had to wait for something else tells nothing. Of reads the mean: the system reads ahead.
    """
    pieces = [memoryview(mmap.mmap(-1, PIECE)) for _ in range(PIECES)]
    for piece in pieces:
        piece[:] = os.urandom(1 << 12) * (PIECE >> 12)
    through = scratch.fileno()
    reserve(through, 2 * SCRATCH)
    past = _opened_directly(through)
    try:
        to_cache, to_disk = _timed(os.pwrite, pieces, through, past)
    finally:
        if past is not None:
            os.close(past)
    at_hand, from_host = memory_at_hand(_written_further(to_cache, through, pieces))
    way = _typical(median, to_cache[: max(1, int(min(at_hand, SCRATCH)) // PIECE)])
    from_cache, from_disk = _timed(os.preadv, [[piece] for piece in pieces], through, through if to_disk else None)
    copying = _typical(fmean, from_cache).working
    crowding = _crowding(through, min(workers, cores), copying)
    here = Cluster(
        cores, copy_again=copying, copy_out=way.working, crowding=crowding, at_hand=at_hand, from_host=from_host,
        is_measured=True,
    )  # fmt: skip
    if not to_disk or not from_disk:
        return here
    past_cache, reading = _typical(median, to_disk), _typical(fmean, from_disk)
    free_memory = _free_memory()
    return replace(
        here,
        read=1 / reading.elapsed,
        write=1 / past_cache.elapsed,
        fetch=reading.working,
        past_cache=past_cache,
        write_wait=way.waiting,
        buffered=DIRTY_SHARE * free_memory,
        free_memory=free_memory,
    )


def _written_further(written: Sequence[Way], descriptor: int, pieces: Sequence[memoryview]) -> list[float]:
    """Write more pieces through the page cache, where there is room; return the seconds a byte of all, in their order.

    They go on behind what was written, and end where there are enough of them or it takes too long.
    """
    times = [way.working for way in written]
    until = time.perf_counter() + LONGEST / 2
    with suppress(OSError):
        reserve(descriptor, 2 * SCRATCH + MORE)
        for number in range(MORE // PIECE):
            started = time.thread_time()
            moved = os.pwrite(descriptor, pieces[number % PIECES], 2 * SCRATCH + number * PIECE)
            times.append((time.thread_time() - started) / max(1, moved))
            if time.perf_counter() > until:
                break
    return times


def memory_at_hand(times: Sequence[float]) -> tuple[float, float]:
    """Return how many bytes of memory a system has at hand, and the seconds more that a byte beyond them takes.

    ``times`` are the seconds a byte of pieces written one after another, each to new pages. Where they fall into a
    quick part and one much slower behind it is seen by the step that leaves the least squares.
    """
    if len(times) <= FEWEST:
        return math.inf, 0.0

    def explained(at: int) -> float:
        return at * fmean(times[:at]) ** 2 + (len(times) - at) * fmean(times[at:]) ** 2

    at = max(range(1, len(times) - FEWEST + 1), key=explained)
    before, behind = times[:at], times[at:]
    if median(behind) <= HOST * median(before):  # one piece that waited for something else makes no step
        return math.inf, 0.0
    return float(at * PIECE), fmean(behind) - fmean(before)


def _crowding(descriptor: int, readers: int, alone: float) -> float:
    """Return how many times as long some readers at once take to copy what is in the page cache, as one of them does.

    Where memory moves fewer bytes than all cores can copy, their processor time grows.
    """
    if readers < 2:
        return 1.0
    seconds: list[float] = []
    moved: list[int] = []

    def read(number: int) -> None:
        piece = memoryview(mmap.mmap(-1, PIECE))
        piece[:] = bytes(PIECE)  # its pages are there before it is timed
        started = time.thread_time()
        places = range(number * PIECE, SCRATCH, readers * PIECE)
        with suppress(OSError):  # after Ctrl-C the file is closed
            moved.append(sum(_from_cache(descriptor, piece, at) for at in places))
            seconds.append(time.thread_time() - started)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not sum(moved) or not alone:
        return 1.0
    return min(MOST_CROWDED, max(1.0, sum(seconds) / sum(moved) / alone))


def _timed(
    move: Callable[..., int], pieces: Sequence[Any], first: int, second: int | None
) -> tuple[list[Way], list[Way]]:
    """Time moves of pieces, in turns in the first half of a file and in the second, each by its descriptor.

    They end where there are enough of them, or it takes too long. There is no second way without a descriptor, or where
    the system can't do it.
    """
    halves = [(first, 0)] if second is None else [(first, 0), (second, SCRATCH)]
    ways: tuple[list[Way], list[Way]] = [], []
    until = time.perf_counter() + LONGEST
    for number, place in enumerate(range(0, SCRATCH, PIECE)):
        for way, (descriptor, begin) in zip(ways, halves, strict=False):
            started, worked = time.perf_counter(), time.thread_time()
            try:
                moved = move(descriptor, pieces[number % PIECES], begin + place)
            except OSError:
                if begin == 0:
                    raise
                return _timed(move, pieces, first, None)
            working = time.thread_time() - worked
            waiting = max(0.0, time.perf_counter() - started - working)
            if moved:
                way.append(Way(working / moved, waiting / moved))
        if time.perf_counter() > until:
            break
    return ways


def _typical(typical: Callable[[Iterable[float]], float], ways: Sequence[Way]) -> Way:
    return Way(*map(typical, zip(*ways, strict=True)))


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


class Cached(NamedTuple):
    """What of some files is in the page cache: the share of their bytes, and seconds of processor time to copy one.

    The seconds are None where nothing is there.
    """

    share: float
    copying: float | None


def cached(files: Iterable[tuple[Path, int]], known: Callable[[Path], bool] = lambda _: False) -> Cached:
    """Look what of some files, each with its size, is in the page cache, by pieces of each; what is ``known`` to be is.

    A look brings nothing there. Nothing is found where the system can't tell.
    """
    there = total = 0.0
    moved, working = 0, 0.0
    pieces = cycle([memoryview(mmap.mmap(-1, PIECE)) for _ in range(PIECES)])
    for path, size in files:
        total += size
        if known(path):
            there += size
            continue
        with suppress(OSError, AttributeError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                places = range(0, size, max(1, size // LOOKS))
                for place in places:
                    started = time.thread_time()
                    some = _from_cache(descriptor, next(pieces)[: PIECE if moved < COPIED else 1], place)
                    if some > 1:
                        moved, working = moved + some, working + time.thread_time() - started
                    there += size * (some > 0) / len(places)
            finally:
                os.close(descriptor)
    return Cached(there / total if total else 0.0, working / moved if moved else None)


def _from_cache(descriptor: int, out: memoryview, place: int) -> int:
    try:
        return os.preadv(descriptor, [out], place, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
