"""Blocks of files elsewhere, fetched before they are asked for: several at once, in the order in which they are read.

Whoever knows what it will read says so, task by task (``expect``). The bytes of a task are cut into blocks, and some
threads fetch them in order, as far as there is room. A block that was read to its end makes room for another one; in a
task that is read again for its statistics, only where the task is larger than the room. Who reads many places of a file
says them together (``fill_parts``): they are fetched in the file's order, and what lies near each other at once.
"""

from __future__ import annotations

import mmap
import threading
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

from mergekit_lite.checkpoint.stores.cache import fetch
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile

BLOCK = 4 << 20  # bytes of one request
ROOM = 24 << 20  # bytes of the blocks that a reader has or waits for
FETCHERS = 6  # threads of a reader, each with a request of its own
SMALL = 1 << 18  # bytes of a block that gets memory of its own; larger ones share buffers of a whole block
LEAST = 1 << 16  # bytes of a request for what nobody expected
GAP = 1 << 16  # bytes between two places at most that are fetched along, as asking twice would take longer
LONGEST_CLOSING = 5.0  # seconds
TAILS = 4  # files of which what lies behind an unexpected read is kept
PER_READER = ROOM + 2 * BLOCK + (8 << 20)  # bytes of memory at most: blocks, places, one that is urgent, threads


class Extent(NamedTuple):
    """Bytes of a file that will be read; of extents with the same ``turn`` the first bytes are read first."""

    file: RemoteFile
    begin: int
    end: int
    turn: int = 0


@dataclass(eq=False)
class Block:
    """Some bytes of a file: wanted, on their way (``asked``), or here (``data``)."""

    file: RemoteFile
    begin: int
    end: int
    data: memoryview | None = None
    failure: BaseException | None = None
    asked: bool = False
    was_read: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin

    @property
    def room(self) -> int:
        """Bytes of memory that it takes."""
        return self.size if self.size < SMALL else BLOCK


class _Course:
    """The blocks of one task, in the order of reading."""

    def __init__(self, blocks: list[Block], again: bool, extra: int = 0) -> None:
        self.blocks = blocks
        self.extra = extra  # bytes that it may take beyond the room, which other tasks may have filled
        self.next = 0  # where fetching goes on
        self.again = again  # whether it is read more than once
        self.room = sum(block.room for block in blocks)
        by_file: dict[str, list[Block]] = {}
        for block in blocks:
            by_file.setdefault(block.file.url, []).append(block)
        self.by_file = {url: sorted(of_file, key=lambda each: each.begin) for url, of_file in by_file.items()}
        self.begins = {url: [block.begin for block in of_file] for url, of_file in self.by_file.items()}
        self.number = {id(block): number for number, block in enumerate(blocks)}

    def at(self, url: str, position: int) -> Block | None:
        """Return the block that holds a byte."""
        of_file = self.by_file.get(url)
        if of_file is None:
            return None
        at = bisect_right(self.begins[url], position) - 1
        return of_file[at] if at >= 0 and position < of_file[at].end else None


class BlockReader:
    """The blocks of one worker, which reads them in one thread."""

    def __init__(self, room: int = ROOM, fetchers: int = FETCHERS) -> None:
        self._room = room
        self._fetchers = fetchers
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._courses: deque[_Course] = deque()
        self._urgent: deque[Block] = deque()
        self._spare: list[mmap.mmap] = []  # buffers: what the heap gave for so many sizes and threads it would keep
        self._used = 0  # bytes of the blocks that are here or on their way
        self._tails: OrderedDict[str, tuple[int, bytearray]] = OrderedDict()
        self._ends: dict[str, int] = {}  # by URL, where the last unexpected read ended
        self._is_closed = False

    def expect(self, extents: Iterable[Extent], *, again: bool = False) -> None:
        """Say what will be read after all that was said before, once or ``again`` from its begin."""
        course = _Course(list(_cut(list(extents))), again)
        if course.blocks:
            with self._changed:
                self._courses.append(course)
                self._start()
                self._changed.notify_all()

    def fill(self, file: RemoteFile, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes of a file from ``begin`` on. Raises as ``ranges.fetch``."""
        while out:
            with self._changed:
                block = self._expected(file.url, begin)
                if block is not None:
                    count = self._copy(block, begin, out)
            if block is None:
                count = self._unexpected(file, begin, out)
            begin, out = begin + count, out[count:]

    def fill_parts(self, file: RemoteFile, parts: Iterable[tuple[int, memoryview]]) -> None:
        """Fill several buffers from places of a file, each given with its first byte. Raises as ``ranges.fetch``.

        Before other tasks go on, these places are fetched, several at once.
        """
        ordered = sorted(parts, key=lambda part: part[0])
        course = _Course(list(_cut(_near(file, ordered))), again=False, extra=BLOCK)
        with self._changed:
            self._courses.appendleft(course)
            self._start()
            self._changed.notify_all()
        try:
            earlier: tuple[int, memoryview] = -1, memoryview(b"")
            for begin, out in ordered:
                if begin == earlier[0] and len(out) <= len(earlier[1]):  # one row for several tokens
                    out[:] = earlier[1][: len(out)]
                else:
                    self.fill(file, begin, out)
                    earlier = begin, out
        finally:
            with self._changed:
                self._courses.remove(course)
                self._drop(course)

    def close(self) -> None:
        """End the threads; one that is still trying to fetch something is left to itself after some seconds."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        until = time.monotonic() + LONGEST_CLOSING
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._courses.clear()
        self._tails.clear()
        self._spare.clear()

    def _expected(self, url: str, position: int) -> Block | None:
        """Return the block that holds a byte; the tasks before the one that it is of are over."""
        for number, course in enumerate(self._courses):
            if (block := course.at(url, position)) is not None:
                for _ in range(number):
                    self._drop(self._courses.popleft())
                return block
        return None

    def _drop(self, course: _Course) -> None:
        for block in course.blocks:
            block.was_read = True
            self._free(block)
        self._changed.notify_all()

    def _free(self, block: Block) -> None:
        if block.data is not None:
            if block.size >= SMALL:
                self._spare.append(cast(mmap.mmap, block.data.obj))
            block.data, block.asked = None, False
            self._used -= block.room

    def _copy(self, block: Block, begin: int, out: memoryview) -> int:
        """Wait for a block and copy what is wanted of it; return how much that is."""
        course = self._courses[0]
        if block.data is None and not block.asked:
            block.asked = True
            self._used += block.room
            self._urgent.append(block)
            if block.was_read:  # from here on the task is read once more
                course.next = course.number[id(block)]
                for later in course.blocks[course.next :]:
                    later.was_read = False
            self._changed.notify_all()
        while block.data is None and block.failure is None:
            self._changed.wait()
        if block.failure is not None:
            raise block.failure
        assert block.data is not None
        start = begin - block.begin
        count = min(len(out), block.size - start)
        out[:count] = block.data[start : start + count]
        if begin + count == block.end:
            block.was_read = True
            if not (course.again and course.room <= self._room):
                self._free(block)
            self._changed.notify_all()
        return count

    def _next(self) -> Block | None:
        """Return what to fetch now, if anything."""
        if self._urgent:
            return self._urgent.popleft()
        for course in self._courses:
            while course.next < len(course.blocks):
                block = course.blocks[course.next]
                if block.asked or block.was_read:
                    course.next += 1
                elif self._used + block.room <= self._room + course.extra or not self._used:
                    course.next += 1
                    block.asked = True
                    self._used += block.room
                    return block
                else:
                    return None
            if course.again and course.room > self._room:  # its blocks are needed once more, before the next task's
                return None
        return None

    def _start(self) -> None:
        wanted = min(self._fetchers, sum(len(course.blocks) for course in self._courses))
        while len(self._threads) < wanted:
            thread = threading.Thread(target=self._fetch_blocks, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _fetch_blocks(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (block := self._next()) is None:
                    self._changed.wait()
                if self._is_closed:
                    break
            assert block is not None
            data: memoryview | None = None
            failure: BaseException | None = None
            try:
                data = self._memory(block)
                fetch(block.file, block.begin, data)
            except BaseException as error:
                failure = error
            with self._changed:
                block.data, block.failure = data, failure
                if block.was_read and not self._is_of_current(block):
                    self._free(block)
                self._changed.notify_all()

    def _memory(self, block: Block) -> memoryview:
        if block.size < SMALL:
            return memoryview(bytearray(block.size))
        with self._changed:
            buffer = self._spare.pop() if self._spare else mmap.mmap(-1, BLOCK)
        return memoryview(buffer)[: block.size]

    def _is_of_current(self, block: Block) -> bool:
        return any(id(block) in course.number for course in self._courses)

    def _unexpected(self, file: RemoteFile, begin: int, out: memoryview) -> int:
        """Fetch what nobody expected: what was asked for, or more of it where reading runs on through the file."""
        if file.url in self._tails:
            start, data = self._tails[file.url]
            if start <= begin < start + len(data):
                self._tails.move_to_end(file.url)
                count = min(len(out), start + len(data) - begin)
                out[:count] = memoryview(data)[begin - start : begin - start + count]
                self._ends[file.url] = begin + count
                return count
        runs_on = self._ends.get(file.url) == begin
        self._ends[file.url] = begin + len(out)
        length = min(file.size - begin, BLOCK if runs_on else LEAST)
        if len(out) >= length:
            fetch(file, begin, out)
            return len(out)
        data = bytearray(length)
        fetch(file, begin, memoryview(data))
        out[:] = memoryview(data)[: len(out)]
        self._tails[file.url] = begin, data
        self._tails.move_to_end(file.url)
        if len(self._tails) > TAILS:
            self._tails.popitem(last=False)
        return len(out)


def room_of(nbytes: int) -> int:
    """Return the bytes of memory that the blocks of a tensor take."""
    whole, rest = divmod(nbytes, BLOCK)
    return whole * BLOCK + (rest if rest < SMALL else BLOCK)


def _near(file: RemoteFile, parts: list[tuple[int, memoryview]]) -> list[Extent]:
    """Return the extents that hold some places of a file, which are in its order, with the small gaps between them."""
    found: list[Extent] = []
    for begin, out in parts:
        end = begin + len(out)
        if found and begin <= found[-1].end + GAP:
            found[-1] = found[-1]._replace(end=max(end, found[-1].end))
        else:
            found.append(Extent(file, begin, end, len(found)))
    return found


def _cut(extents: list[Extent]) -> Iterator[Block]:
    """Yield the blocks of some extents in the order in which they are read; what lies side by side is one run."""
    runs: list[list[Extent]] = []
    last: dict[str, list[Extent]] = {}
    for extent in extents:
        if extent.begin >= extent.end:
            continue
        run = last.get(extent.file.url)
        if run is not None and run[-1].end == extent.begin:
            run.append(extent)
        else:
            last[extent.file.url] = run = [extent]
            runs.append(run)
    placed: list[tuple[int, float, int, Block]] = []
    for number, run in enumerate(runs):
        file, begin, end = run[0].file, run[0].begin, run[-1].end
        starts = [each.begin for each in run]
        for start in range(begin, end, BLOCK):
            of = run[bisect_right(starts, start) - 1]
            share = (start - of.begin) / (of.end - of.begin)
            placed.append((of.turn, share, number, Block(file, start, min(start + BLOCK, end))))
    placed.sort(key=lambda each: each[:3])
    return (block for *_, block in placed)
