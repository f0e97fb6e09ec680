"""Blocks that are fetched ahead: the right bytes whatever is read, within the room, each once where that can be."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mergekit_lite.checkpoint.encodings.dense import Dense
from mergekit_lite.checkpoint.encodings.gathered import Places, gathered
from mergekit_lite.checkpoint.encodings.sum import Sum
from mergekit_lite.checkpoint.extents import extents, files_of
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.stores import cache, read_ahead
from mergekit_lite.checkpoint.stores.files import Mirror, StorePath, know
from mergekit_lite.checkpoint.stores.private_folder import TURN
from mergekit_lite.checkpoint.stores.read_ahead import BlockReader, Extent
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.checkpoint.tensor import TensorSpec

SIZE = 50_000
CONTENT = {f"s3://b/{n}": random.Random(n).randbytes(SIZE) for n in range(3)}
FILES = [RemoteFile(url, SIZE, "") for url in CONTENT]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each byte was fetched, from blocks of a thousand bytes."""
    counts: Counter[tuple[str, int]] = Counter()
    lock = threading.Lock()

    def fetch(file: RemoteFile, begin: int, out: memoryview) -> None:
        assert begin >= 0 and begin + len(out) <= SIZE and len(out) > 0
        time.sleep(random.random() / 2000)
        out[:] = CONTENT[file.url][begin : begin + len(out)]
        with lock:
            counts.update((file.url, at) for at in range(begin, begin + len(out)))

    monkeypatch.setattr(read_ahead, "fetch", fetch)
    monkeypatch.setattr(read_ahead, "BLOCK", 1000)
    monkeypatch.setattr(read_ahead, "SMALL", 100)
    monkeypatch.setattr(read_ahead, "LEAST", 50)
    return counts


def read(reader: BlockReader, file: RemoteFile, begin: int, count: int) -> None:
    out = bytearray(count)
    reader.fill(file, begin, memoryview(out))
    assert out == CONTENT[file.url][begin : begin + count]


def test_what_is_expected_is_fetched_once_and_within_the_room(fetched: Counter[tuple[str, int]]) -> None:
    reader = BlockReader(room=5000, fetchers=4)
    tasks = [[Extent(file, task * 3500 + n, task * 3500 + 3500) for n, file in enumerate(FILES)] for task in range(6)]
    most = 0
    for task in tasks[:3]:
        reader.expect(task)
    for number, task in enumerate(tasks):
        for start in range(0, 3500, 250):
            for extent in task:
                begin = extent.begin + start
                if begin < extent.end:
                    read(reader, extent.file, begin, min(250, extent.end - begin))
                most = max(most, reader._used)
        if number + 3 < len(tasks):
            reader.expect(tasks[number + 3])
    reader.close()
    assert set(fetched.values()) == {1} and most <= 6000


def test_a_task_that_is_read_again_is_kept_where_there_is_room(fetched: Counter[tuple[str, int]]) -> None:
    for size, times in ((2000, 1), (12_000, 3)):
        fetched.clear()
        reader = BlockReader(room=8000, fetchers=3)
        reader.expect([Extent(file, 0, size) for file in FILES[:2]], again=True)
        reader.expect([Extent(FILES[2], 0, 3000)])
        for _ in range(3):
            for begin in range(0, size, 500):
                for file in FILES[:2]:
                    read(reader, file, begin, 500)
        read(reader, FILES[2], 0, 3000)
        reader.close()
        assert max(fetched.values()) <= times and fetched[FILES[2].url, 0] == 1


def test_whatever_is_read_in_whatever_order(fetched: Counter[tuple[str, int]]) -> None:
    seed = random.SystemRandom().randrange(10_000)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(8):
        reader = BlockReader(room=draw.choice([1000, 3000, 10_000]), fetchers=draw.choice([1, 2, 5]))
        for _ in range(draw.randrange(6)):
            extents = []
            for turn in range(draw.randrange(1, 5)):
                begin = draw.randrange(SIZE)
                extents.append(Extent(draw.choice(FILES), begin, min(SIZE, begin + draw.randrange(6000)), turn))
            reader.expect(extents, again=draw.random() < 0.5)
            for extent in draw.sample(extents, len(extents)):
                for _ in range(draw.randrange(4)):
                    begin = draw.randrange(max(0, extent.begin - 100), min(SIZE - 1, extent.end + 100))
                    read(reader, extent.file, begin, min(SIZE - begin, draw.randrange(1, 3000)))
        reader.close()


def test_a_failure_reaches_whoever_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(file: RemoteFile, begin: int, out: memoryview) -> None:
        raise OSError("gone")

    monkeypatch.setattr(read_ahead, "fetch", fetch)
    reader = BlockReader()
    reader.expect([Extent(FILES[0], 0, SIZE)])
    with pytest.raises(OSError, match="gone"):
        reader.fill(FILES[0], 0, memoryview(bytearray(10)))
    reader.close()


def test_a_cache_saves_fetching_again_up_to_its_bound(
    fetched: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two processes share it; what it holds is the files' bytes, and no more than the bound and a block."""
    monkeypatch.setattr(cache.ranges, "fetch", read_ahead.fetch)
    monkeypatch.setattr(cache, "GRAIN", 64)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    draw = random.Random(3)
    for limit, again in ((10 * SIZE, 1), (20_000, 2)):
        fetched.clear()
        with cache.caching(limit):
            for _ in range(2):
                for begin in range(0, SIZE, 1000):
                    out = bytearray(min(1000, SIZE - begin))
                    cache.fetch(FILES[0], begin, memoryview(out))
                    assert out == CONTENT[FILES[0].url][begin : begin + 1000]
            pid = os.fork()
            if pid == 0:
                before = fetched.total()
                out = bytearray(10_000)
                cache.fetch(FILES[0], 100, memoryview(out))
                right = out == CONTENT[FILES[0].url][100:10_100] and (fetched.total() - before < 1500 or again > 1)
                os._exit(0 if right else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            for _ in range(30):
                begin = draw.randrange(SIZE - 1)
                out = bytearray(min(SIZE - begin, draw.randrange(1, 5000)))
                cache.fetch(FILES[1], begin, memoryview(out))
                assert out == CONTENT[FILES[1].url][begin : begin + len(out)]
            [folder] = tmp_path.glob("*/fetched-*")
            assert (folder / "used").stat().st_size * 64 <= min(limit, 2 * SIZE + 128)
        counts = [count for (url, _), count in fetched.items() if url == FILES[0].url]
        assert sum(counts) < 1.15 * SIZE if again == 1 else sum(counts) > 1.2 * SIZE
        assert [path.name for path in tmp_path.glob("*/*")] == [TURN]


def test_a_full_disk_ends_the_cache_and_not_the_run(
    fetched: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was written before in part is no byte of the file; what is whole still serves."""
    monkeypatch.setattr(cache.ranges, "fetch", read_ahead.fetch)
    monkeypatch.setattr(cache, "GRAIN", 64)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = 20_000
    write = cache.positioned.write

    def limited(descriptor: int, data: memoryview, place: int) -> int:
        nonlocal left
        if left == 0:
            raise OSError(28, "No space left on device")
        count = min(len(data), left, 700)
        left -= count
        return write(descriptor, data[:count], place)

    monkeypatch.setattr(cache.positioned, "write", limited)
    with cache.caching(10 * SIZE):
        for _ in range(2):
            for begin in range(0, SIZE, 1000):
                out = bytearray(min(1000, SIZE - begin))
                cache.fetch(FILES[0], begin, memoryview(out))
                assert out == CONTENT[FILES[0].url][begin : begin + len(out)]
    assert left == 0 and 1.5 * SIZE < fetched.total() < 1.7 * SIZE


def test_places_that_are_said_together(fetched: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is fetched once, near ones in one request, several requests at once, and other tasks keep theirs."""
    seed = random.SystemRandom().randrange(10_000)
    print("seed", seed)
    draw = random.Random(seed)
    monkeypatch.setattr(read_ahead, "GAP", 40)
    requests: list[tuple[int, int]] = []
    under_way = most = 0
    fetch = read_ahead.fetch

    def counted(file: RemoteFile, begin: int, out: memoryview) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.002)
        fetch(file, begin, out)
        if file is FILES[0]:
            requests.append((begin, begin + len(out)))
        under_way -= 1

    monkeypatch.setattr(read_ahead, "fetch", counted)
    for width, count in ((20, 200), (150, 30), (2500, 7)):
        fetched.clear()
        requests.clear()
        reader = BlockReader(room=5000, fetchers=4)
        reader.expect([Extent(FILES[1], 0, 8000), Extent(FILES[0], 0, 8000)])
        read(reader, FILES[1], 0, 10)
        rows = [draw.randrange(SIZE // width) for _ in range(count)] + [3, 3]
        outs = [bytearray(width) for _ in rows]
        reader.fill_parts(FILES[0], [(row * width, memoryview(out)) for row, out in zip(rows, outs, strict=True)])
        for row, out in zip(rows, outs, strict=True):
            assert out == CONTENT[FILES[0].url][row * width : (row + 1) * width]
        asked = [request for request in requests if request not in [(at, at + 1000) for at in range(0, 8000, 1000)]]
        starts = sorted({row * width for row in rows})
        wanted = {at for row in rows for at in range(row * width, (row + 1) * width)}
        assert sum(end - begin for begin, end in asked) <= len(wanted) + 40 * len(set(rows))
        gaps = sum(after - before > width + 40 for before, after in pairwise(starts))
        assert len(asked) <= gaps + 1 + sum(end - begin for begin, end in asked) // 1000
        read(reader, FILES[1], 10, 7990)
        assert max(count for (url, _), count in fetched.items() if url == FILES[1].url) == 1
        assert reader._used <= 6000 and len(reader._courses) == 1
        reader.close()
    assert most > 2


def test_rows_of_a_vocabulary_elsewhere(fetched: Counter[tuple[str, int]], tmp_path: Path) -> None:
    """A permuted matrix of rows: a handful of requests for what neighbours in the file, whatever the order."""
    know(str(tmp_path), Mirror("s3://b", {"m": FILES[0]}))
    matrix = TensorSpec("w", "uint8", (100, 50), StorePath(tmp_path / "model" / "m"), 700)
    order = np.random.default_rng(0).permutation(40).astype(np.int32)
    places = Places(np.zeros(40, np.int32), order)
    out = bytearray(40 * 50)
    with Reader() as reader:
        gathered(matrix, [matrix], places).fill(reader, 0, memoryview(out))
    content = CONTENT[FILES[0].url]
    assert out == b"".join(content[700 + row * 50 : 750 + row * 50] for row in order)
    assert set(fetched.values()) == {1} and len(fetched) == 40 * 50


def test_memory_that_runs_out_is_an_error(fetched: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a block is told, and doesn't wait on."""

    def refuse(reader: BlockReader, block: read_ahead.Block) -> memoryview:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(BlockReader, "_memory", refuse)
    reader = BlockReader(room=5000, fetchers=2)
    reader.expect([Extent(FILES[0], 0, 3000)])
    with pytest.raises(OSError, match="Cannot allocate memory"):
        read(reader, FILES[0], 0, 500)
    reader.close()


def test_rows_in_another_order_are_not_expected() -> None:
    """They would hold blocks of every matrix that a row may be from, and be read from few of them."""
    matrices = [TensorSpec(name, "bfloat16", (4, 8), Path(name), 0) for name in "ab"]
    assert list(extents(matrices[1], 8, 16)) == [(Path("b"), 16, 32)]
    places = Places(np.array([1, 0, -1], np.int32), np.array([0, 3, 0], np.int32), (((0, 1), (1, 1)),))
    rows = gathered(matrices[0], matrices, places)
    assert not list(extents(rows, 0, 24))
    added = replace(matrices[0], encoding=Sum(rows, (Dense(replace(matrices[1], file=Path("c"))),)))
    assert files_of(added) == {Path("a"), Path("b"), Path("c")} and files_of(matrices[1]) == {Path("b")}
