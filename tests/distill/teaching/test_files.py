"""A teacher's folder: found by key, resumed after a kill, held to what made it."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mergekit_lite.distillation.teaching import shard
from mergekit_lite.distillation.teaching.files import TaughtFile
from mergekit_lite.errors import MergekitLiteError, RunError, UnreadableError, UsageError
from tests.distill.teaching.made import numbered, same
from tests.processes import Forked, preload

preload("mergekit_lite.distillation.teaching.files", "tests.distill.teaching.made")

SETTINGS = {"teacher": "strong", "vocabulary": 300, "top": 24}
ROWS = [numbered(number) for number in range(60)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "FULL_ROWS", 8)


def filled(folder: Path, number: int = len(ROWS)) -> Path:
    with TaughtFile.with_settings(folder, SETTINGS) as file:
        file.append(ROWS[:number])
    return folder


def test_rows_are_found_by_their_keys(tmp_path: Path) -> None:
    file = TaughtFile(filled(tmp_path / "strong"))
    assert len(file) == len(ROWS)
    assert sorted(file.keys()) == sorted(row.key for row in ROWS)
    for row in reversed(ROWS):
        assert row.key in file
        found = file.get(row.key)
        assert found is not None and same(found, row)
        alone = file.get(row.key, likeliest=False)
        assert alone is not None and alone.top_ids.shape == alone.top_log_probs.shape == (len(row.tokens), 0)
        assert same(alone, replace(row, top_ids=alone.top_ids, top_log_probs=alone.top_log_probs))
    assert file.get("0" * 32) is None and file.get("no key") is None
    assert [row.key for row in file] == [row.key for row in ROWS]
    assert file.tokens == sum(len(row.tokens) for row in ROWS)
    assert file.cross_entropy == pytest.approx(
        sum(row.cross_entropy * len(row.tokens) for row in ROWS) / file.tokens, rel=1e-6
    )
    assert len(list(tmp_path.glob("strong/*.index"))) == len(ROWS) // 8


def test_rows_are_added_once_and_in_any_session(tmp_path: Path) -> None:
    for start in range(0, 30, 5):
        with TaughtFile.with_settings(tmp_path, SETTINGS) as file:
            file.append(ROWS[: start + 5])
            assert [row.key for row in file] == [row.key for row in ROWS[: start + 5]]
    whole = [path.read_bytes() for path in sorted(tmp_path.glob("*.taught"))]
    filled(tmp_path / "at-once", 30)
    assert whole == [path.read_bytes() for path in sorted(tmp_path.glob("at-once/*.taught"))]


def test_a_lost_or_foreign_index_is_made_good(tmp_path: Path) -> None:
    filled(tmp_path)
    first, second, *_ = sorted(tmp_path.glob("*.index"))
    shutil.copy(second, first)
    second.write_bytes(second.read_bytes()[:-3])
    file = TaughtFile(tmp_path)
    assert len(file) == len(ROWS)
    assert all(file.get(row.key) is not None for row in ROWS)


def test_a_torn_tail_is_dropped_at_every_byte(tmp_path: Path) -> None:
    filled(tmp_path / "whole", 3)
    path = tmp_path / "whole" / "00000.taught"
    content = path.read_bytes()
    lengths = [len(shard.record_of(row, 300)) for row in ROWS[:3]]
    for size in range(0, len(content), 61):
        path.write_bytes(content[:size])
        kept = sum(shard.HEAD + sum(lengths[: n + 1]) <= size for n in range(3))
        assert len(TaughtFile(tmp_path / "whole")) == kept
        filled(tmp_path / "whole", 3)
        assert path.read_bytes() == content


@pytest.mark.parametrize("place", [2, 40])  # in the record's length, and in what is encoded
def test_a_damaged_row_and_what_follows_it_are_told(tmp_path: Path, place: int) -> None:
    assert filled(tmp_path, 5) and TaughtFile(tmp_path).notes == []
    path = tmp_path / "00000.taught"
    content = bytearray(path.read_bytes())
    lengths = [len(shard.record_of(row, 300)) for row in ROWS[:5]]
    content[shard.HEAD + sum(lengths[:2]) + place] ^= 255
    path.write_bytes(content)
    file = TaughtFile(tmp_path)
    assert len(file) == 2
    assert f"{path}: the last {sum(lengths[2:]):,} bytes are no whole row" in file.notes[0]
    filled(tmp_path, 5)
    assert len(TaughtFile(tmp_path)) == 5 and TaughtFile(tmp_path).notes == []


def test_zeros_after_the_last_row_are_dropped(tmp_path: Path) -> None:
    """As a power cut may leave them."""
    path = filled(tmp_path, 3) / "00000.taught"
    content = path.read_bytes()
    path.write_bytes(content + bytes(5000))
    filled(tmp_path, 4)
    assert len(TaughtFile(tmp_path)) == 4 and path.read_bytes()[: len(content)] == content


def test_a_kill_loses_only_the_row_in_flight(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    folder, before = tmp_path / "strong", 0
    for kill in range(2):
        told = tmp_path / f"told{kill}"
        with Forked(tmp_path, add, folder, told) as process:
            until = time.monotonic() + 600
            while (not told.exists() or told.stat().st_size < draw.randrange(1, 40)) and time.monotonic() < until:
                time.sleep(0.001)
            process.send(signal.SIGKILL)
            process.end()
        acknowledged = told.stat().st_size
        file = TaughtFile(folder)
        assert 0 < acknowledged <= len(file) <= max(acknowledged + 1, before)
        before = len(file)
        assert all(same(row, numbered(int(row.key[16:], 16))) for row in file)
    file = TaughtFile(filled(folder))
    assert all(same(row, file.get(row.key)) for row in ROWS)  # type: ignore[arg-type]


def add(folder: Path, told: Path) -> None:
    """Add rows one by one without end, and tell of each by one more byte of a file."""
    shard.FULL_ROWS = 8
    with TaughtFile.with_settings(folder, SETTINGS) as file, told.open("ab", buffering=0) as telling:
        for number in range(1 << 20):
            file.append([numbered(number)])
            telling.write(b".")


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(UsageError, match=r"top: was 24, is 12") as refused:
        TaughtFile.with_settings(tmp_path, {**SETTINGS, "top": 12})
    assert "teacher: was" not in str(refused.value)


def test_a_shard_of_another_teacher_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "one")
    with TaughtFile.with_settings(tmp_path / "two", {**SETTINGS, "teacher": "other"}) as file:
        file.append(ROWS[:3])
    shutil.copy(tmp_path / "two" / "00000.taught", tmp_path / "one" / "00099.taught")
    with pytest.raises(UnreadableError, match="another teacher"):
        TaughtFile(tmp_path / "one")


def test_one_process_adds_at_a_time(tmp_path: Path) -> None:
    with TaughtFile.with_settings(tmp_path, SETTINGS) as one, TaughtFile.with_settings(tmp_path, SETTINGS) as two:
        one.append(ROWS[:2])
        with pytest.raises(RunError, match="another process"):
            two.append(ROWS[2:4])
        one.close()
        two.append(ROWS[:4])
        assert len(two) == 4


def test_damage_is_found_where_it_is_read(tmp_path: Path) -> None:
    path = filled(tmp_path) / "00001.taught"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    file = TaughtFile(tmp_path)
    bad = 0
    for row in ROWS:
        try:
            assert same(file.get(row.key), row)  # type: ignore[arg-type]
        except UnreadableError as error:
            assert "is damaged" in str(error)
            bad += 1
    assert bad == 1


def test_strangers_files_are_one_line(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    filled(tmp_path, 12)
    paths = sorted(path for path in tmp_path.iterdir() if path.name != ".lock")
    whole = {path: path.read_bytes() for path in paths}
    for _ in range(120):
        path = draw.choice(paths)
        content = bytearray(whole[path])
        for _ in range(draw.randrange(1, 6)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content) + 1)])])
        try:
            for _ in TaughtFile(tmp_path):
                pass
        except MergekitLiteError as error:
            assert "\n" not in str(error)
        path.write_bytes(whole[path])
    assert len(TaughtFile(tmp_path)) == 12
