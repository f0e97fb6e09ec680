"""Ledgers: files of rows that are made one by one, and survive kills."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import as_line
from mergekit_lite.errors import RunError

KEYS = tuple(range(20))


def row(key: int) -> dict[str, Any]:
    return {"key": key, "text": f"ä line\n {key}" * (key % 3)}


def ledger(path: Path, expected: tuple[int, ...] = KEYS) -> Ledger[int]:
    return Ledger(path, expected, lambda row: int(row["key"]))


def whole(keys: tuple[int, ...] = KEYS) -> bytes:
    return "".join(as_line(row(key)) for key in keys).encode()


def test_rows_in_any_order_end_in_the_expected_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    made = ledger(path)
    shuffled = random.Random(0).sample(KEYS, len(KEYS))
    for key in shuffled[:12]:
        made.append([row(key)])
    made.close()
    again = ledger(path)
    assert again.missing == sorted(shuffled[12:])
    with pytest.raises(ValueError, match="8 rows are missing"):
        again.finish()
    again.append(row(key) for key in reversed(shuffled))
    again.finish()
    assert path.read_bytes() == whole()
    assert list(again.rows()) == [row(key) for key in KEYS]
    assert again.is_finished and not again.partial.exists()


@pytest.mark.parametrize(
    "line",
    [
        b'{"key": [1]}',
        b'{"key": {}}',
        b'{"text": "no key"}',
        b'{"key": 21}',
        b'{"key": 1, "text": 2}',
        b"[" * 100_000,
        b'"key"',
        b"\xff",
        b"9" * 5000,
        b"{",
    ],
    ids=lambda line: repr(line[:12]),
)
@pytest.mark.parametrize("suffix", ["jsonl", "partial.jsonl"])
def test_a_line_that_is_no_row_is_passed_over_and_left_out(tmp_path: Path, line: bytes, suffix: str) -> None:
    path = tmp_path / "a.jsonl"
    rows = whole().splitlines(keepends=True)
    (tmp_path / f"a.{suffix}").write_bytes(b"".join([*rows[:5], line, b"\n", *rows[5:]]))
    damaged = Ledger(path, KEYS, lambda row: row["key"], {"text": str})
    assert not damaged.missing and not damaged.is_finished
    damaged.finish()
    assert path.read_bytes() == whole() and damaged.is_finished


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_line_is_no_row(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    made = ledger(path)
    made.append(row(key) for key in (4, 2, 8))
    made.close()
    content = made.partial.read_bytes()
    made.partial.write_bytes(content[:-cut])
    again = ledger(path)
    assert set(again.missing) >= set(KEYS) - {4, 2, 8} and 4 not in again.missing
    again.append(row(key) for key in again.missing)
    again.close()
    once_more = ledger(path)
    assert not once_more.missing
    once_more.finish()
    assert path.read_bytes() == whole()


def test_rows_no_longer_expected_go_and_new_ones_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    made = ledger(path)
    made.append(row(key) for key in KEYS)
    made.finish()
    fewer = ledger(path, KEYS[:5])
    assert not fewer.is_finished and not fewer.missing
    fewer.finish()
    assert path.read_bytes() == whole(KEYS[:5])
    more = ledger(path, KEYS[:7])
    assert more.missing == [5, 6]
    more.append([row(6)])
    more.finish(with_missing=True)
    assert path.read_bytes() == whole((0, 1, 2, 3, 4, 6))
    assert ledger(path, KEYS[:7]).missing == [5]


def test_a_finished_ledger_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    made = ledger(path)
    made.append(row(key) for key in KEYS)
    made.finish()
    before = path.stat().st_mtime_ns, path.stat().st_ino
    ledger(path).finish()
    assert before == (path.stat().st_mtime_ns, path.stat().st_ino)


def test_a_kill_between_the_two_last_steps_leaves_nothing_doubled(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole())
    made = ledger(path)
    made.partial.write_bytes(whole(KEYS[::-1]))
    again = ledger(path)
    assert not again.is_finished
    again.finish()
    assert path.read_bytes() == whole() and not made.partial.exists()


def test_two_processes_do_not_make_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first, second = ledger(path), ledger(path)
    first.append([row(1)])
    with pytest.raises(RunError, match="another process"):
        second.append([row(2)])
    first.close()
    second.append([row(2)])
    second.close()
    assert 2 in second and 1 not in second


def test_an_empty_ledger_is_an_empty_file(tmp_path: Path) -> None:
    made = ledger(tmp_path / "deep" / "a.jsonl", ())
    made.finish()
    assert made.path.read_bytes() == b"" and made.is_finished
