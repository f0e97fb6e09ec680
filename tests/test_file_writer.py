"""Writing past the page cache: the bytes are those of plain writes, whichever way each of them went."""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.errors import RunError
from mergekit_lite.layout import OutputTensor, safetensors_layout
from mergekit_lite.output import file_writer
from mergekit_lite.output.file_writer import PAGE, FileWriter, WriteTimes, waiting_weight
from mergekit_lite.output.working_folder import WorkingFolder
from mergekit_lite.output.workspace import OutputWorkspace

SIZE = 40 * PAGE + 777
WRITES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 20 * PAGE), st.booleans()), max_size=12)

Writing = Callable[..., int]


@pytest.fixture(autouse=True)
def small_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are enough: every write counts, and takes several direct ones."""
    monkeypatch.setattr(file_writer, "MIN_DIRECT", 1)
    monkeypatch.setattr(file_writer, "DIRECT_WRITE", 4 * PAGE)


@pytest.fixture
def direct_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The lengths of the direct writes, as the system took them, while the two ways take turns."""
    taken: list[int] = []
    turns = cycle((True, False))
    monkeypatch.setattr(WriteTimes, "choose_direct", lambda self: next(turns) and self._seconds[True] < math.inf)
    write_pages = FileWriter._write_pages

    def counting(self: FileWriter, position: int, pages: memoryview) -> int:
        taken.append(write_pages(self, position, pages))
        return taken[-1]

    monkeypatch.setattr(FileWriter, "_write_pages", counting)
    yield taken


@pytest.fixture
def file(tmp_path: Path) -> Iterator[FileWriter]:
    """A file to be written."""
    made = FileWriter(tmp_path / "file", SIZE, WriteTimes())
    yield made
    made.close()


def noise(seed: int, length: int) -> memoryview:
    """Random bytes."""
    return memoryview(random.Random(seed).randbytes(length))


def written_by(writing: Writing) -> Writing:
    """``os.pwrite``, but for direct writes, which are done by ``writing``."""
    plain = os.pwrite

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return writing(descriptor, data, position)
        return plain(descriptor, data, position)

    return pwrite


@given(WRITES)
def test_the_bytes_are_those_of_plain_writes(writes: list[tuple[int, int, bool]]) -> None:
    """Writes of any length anywhere, one over another, each in either way."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path, wanted = Path(folder) / "file", bytearray(SIZE)
        file = FileWriter(path, SIZE, WriteTimes())
        for number, (position, length, direct) in enumerate(writes):
            patch.setattr(WriteTimes, "choose_direct", lambda _, way=direct: way and file._direct is not None)
            data = noise(number, min(length, SIZE - position))
            file.write(position, data)
            wanted[position : position + len(data)] = data
        read = memoryview(bytearray(SIZE))
        assert file.read(0, read) and read == wanted
        file.close()
        assert path.read_bytes() == wanted


def test_memory_that_lies_in_its_page_as_the_file_does_is_not_copied(
    file: FileWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if file._direct is None:
        pytest.skip("no direct writes here")
    monkeypatch.setattr(WriteTimes, "choose_direct", lambda _: True)
    memory = memoryview(mmap.mmap(-1, 8 * PAGE))
    memory[:] = noise(0, 8 * PAGE)
    copies: list[int] = []
    staged = file_writer._stage
    monkeypatch.setattr(file_writer, "_stage", lambda: copies.append(1) or staged())
    for skew, moved, copied in ((0, 0, False), (8, 0, False), (PAGE - 2, 0, False), (8, 2, True)):
        data = memory[skew + moved : 6 * PAGE + 10]
        file.write(3 * PAGE + skew, data)
        assert bool(copies) == copied
        assert (tmp_path / "file").read_bytes()[3 * PAGE + skew :][: len(data)] == data


def test_many_threads_side_by_side(tmp_path: Path, direct_writes: list[int]) -> None:
    """Pieces that end anywhere, so that neighbours share a page, written by many threads at once."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for number in range(10):
        wanted = noise(seed + number, SIZE)
        pieces = list(pairwise([0, *sorted(chance.sample(range(1, SIZE), 30)), SIZE]))
        chance.shuffle(pieces)
        file = FileWriter(tmp_path / str(number), SIZE, WriteTimes())
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(file.write, [begin for begin, _ in pieces], [wanted[begin:end] for begin, end in pieces]))
        file.close()
        assert (tmp_path / str(number)).read_bytes() == wanted
    assert all(length % PAGE == 0 for length in direct_writes)
    assert direct_writes or file_writer._opened_directly(tmp_path / "0") is None


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_when_written_to(
    file: FileWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    tried = []

    def refuse(*arguments: object) -> int:
        tried.append(arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", written_by(refuse))
    wanted = noise(0, SIZE)
    for begin, end in pairwise([0, 9 * PAGE + 1, 20 * PAGE + 5, 30 * PAGE, SIZE]):
        file.write(begin, wanted[begin:end])
    assert (tmp_path / "file").read_bytes() == wanted
    assert len(tried) <= 1


def test_a_file_system_that_refuses_when_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    file, wanted = FileWriter(tmp_path / "file", SIZE, WriteTimes()), noise(0, SIZE)
    for begin in range(0, SIZE, 5 * PAGE):
        file.write(begin, wanted[begin : begin + 5 * PAGE])
    file.close()
    assert (tmp_path / "file").read_bytes() == wanted


def test_a_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    file, wanted = FileWriter(tmp_path / "file", SIZE, WriteTimes()), noise(0, SIZE)
    file.write(0, wanted)
    file.write(0, wanted)
    file.close()
    assert (tmp_path / "file").read_bytes() == wanted


def test_short_direct_writes_go_on(
    file: FileWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_writes: list[int]
) -> None:
    plain = os.pwrite

    def short(descriptor: int, data: memoryview, position: int) -> int:
        return plain(descriptor, data[:PAGE], position)

    monkeypatch.setattr(os, "pwrite", written_by(short))
    wanted = noise(0, SIZE)
    for begin, end in pairwise([0, 9 * PAGE + 1, SIZE]):
        file.write(begin, wanted[begin:end])
    assert (tmp_path / "file").read_bytes() == wanted
    assert set(direct_writes) <= {PAGE}


@pytest.mark.parametrize(
    ("code", "told"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EIO, "can't be written")]
)
def test_what_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_writes: list[int], code: int, told: str
) -> None:
    """A direct write that fails is not tried again through the cache, which could take what the disk can't."""

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    layout = safetensors_layout([[OutputTensor("w", "uint8", (SIZE,))]], ["model.safetensors"])
    folder = WorkingFolder(tmp_path / "out", fresh=False)
    workspace = OutputWorkspace(folder, layout, "digest", [], [])
    if workspace._targets[0]._direct is None:
        pytest.skip("no direct writes here")
    monkeypatch.setattr(os, "pwrite", written_by(fail))
    with pytest.raises(RunError, match=f"model.safetensors: .*{told}"):
        for _ in range(2):
            workspace.write("w", 0, noise(0, SIZE))
    workspace.close()


def test_the_quicker_way_is_taken() -> None:
    """Whichever it is, and when it changes; the other one is tried ever more rarely."""
    times = WriteTimes()
    for cached, direct in ((1.0, 3.0), (9.0, 3.0), (9.0, 30.0)):
        ways = [_step(times, cached, direct) for _ in range(1000)]
        assert ways[-100:].count(direct < cached) >= 99
        assert ways.count(direct < cached) > 980


def test_waiting_weighs_less_only_where_another_worker_fills_it() -> None:
    assert waiting_weight(3, 2) < 1 == waiting_weight(2, 2) == waiting_weight(1, 8)


def test_a_moment_s_delay_does_not_decide() -> None:
    """The way that was delayed once is soon tried again."""
    times = WriteTimes()
    for _ in range(600):
        _step(times, 4.0, 1.0)
    _step(times, 4.0, 50.0)
    assert [_step(times, 4.0, 1.0) for _ in range(1000)].count(True) > 930


def test_what_is_not_there_is_not_tried() -> None:
    times = WriteTimes()
    times.never_direct()
    assert not any(_step(times, 9.0, 1.0) for _ in range(100))


def _step(times: WriteTimes, cached: float, direct: float) -> bool:
    way = times.choose_direct()
    times.record(way, direct if way else cached)
    return way
