"""Small files of strangers: what is no regular file, too long, or not the text or JSON it should be is a message."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite import input_files
from mergekit_lite.errors import UnreadableError
from mergekit_lite.input_files import MAX_DEPTH, MAX_DIGITS, STRIDE, parse_json, read_bytes, read_json, read_text
from tests.waiting import woken_after


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    with woken_after(60):
        yield


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link to a folder": lambda path: path.symlink_to("/"),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "socket": listening,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.json"
    KINDS[kind](path)
    for read in (read_bytes, read_text, read_json):
        with pytest.raises(UnreadableError) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}: ") and raised.value.why


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "\ud800", "x" * 5000):
        with pytest.raises(UnreadableError, match="can't be read"):
            read_text(tmp_path / name)


def test_size_is_bounded_also_where_it_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, 10**12)
    with pytest.raises(UnreadableError, match="1,000,000,000,000 bytes long; more than 100,000,000 is refused"):
        read_bytes(path)
    monkeypatch.setattr(input_files, "MAX_BYTES", 9)
    path.write_bytes(b"123456789")
    assert read_bytes(path) == b"123456789" == read_bytes(path, 9)
    with pytest.raises(UnreadableError, match="more than 8 is refused"):
        read_bytes(path, 8)
    with pytest.raises(UnreadableError, match="longer than its size says"):  # the size of such files is 0
        read_bytes(Path("/proc/self/status"))


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(path) == "a\r\nb"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UnreadableError, match=r"is not UTF-8 text \(unexpected end of data at byte 3\)"):
        read_text(path)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return '{"a":' + opening * depth + "1" + closing * depth + "}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (nested(MAX_DEPTH + 1), "nested deeper than 100 levels"),
        (nested(900), "nested deeper"),
        (nested(100_000), "nested deeper"),
        (nested(300, '{"a":', "}"), "nested deeper"),
        ('{"a":' + "7" * (MAX_DIGITS + 1) + "}", "a number of 251 digits"),
        ('{"a":-' + "7" * 9999 + "}", "a number of 10,000 digits"),
        (r'{"a":"\ud800"}', r"half a surrogate pair, U\+D800"),
        (r'{"a":["x\uDFFF"]}', r"half a surrogate pair, U\+DFFF"),
        (r'{"\udc80":1}', r"half a surrogate pair, U\+DC80"),
        ("\ufeff{}", "not valid JSON"),
        ("[]", "should hold a JSON object, but holds a list"),
        ("", "not valid JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_json_with_surprises(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UnreadableError, match=why) as raised:
        read_json(path)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("before", range(STRIDE))
def test_a_long_number_is_found_wherever_it_begins(before: int) -> None:
    with pytest.raises(ValueError, match="a number of 251 digits"):
        parse_json(" " * before + "[1" + "0" * MAX_DIGITS + "]")


def test_json_that_only_looks_odd() -> None:
    text = r'{"a": "\\ud800", "b": "\ud83d\ude00", "c": Infinity, "d": ' + "7" * MAX_DIGITS + "}"
    assert parse_json(text) == {"a": r"\ud800", "b": "😀", "c": float("inf"), "d": int("7" * MAX_DIGITS)}
    assert parse_json(nested(MAX_DEPTH - 1)) == json.loads(nested(MAX_DEPTH - 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON, st.booleans())
def test_all_other_json_is_what_python_reads(content: object, ascii: bool) -> None:
    text = json.dumps(content, ensure_ascii=ascii)
    assert parse_json(text) == json.loads(text) == content
