"""One file of a teacher's rows: records end to end, each with a digest, and beside it an index once it is full.

A record is its length, the row's number of tokens, its key and Σ −log p of its tokens, then the encoded row, then the
digest of all that. What a kill leaves of a record has no such digest, and nothing after it counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_digest

from mergekit_lite.answers.rows import write_lines
from mergekit_lite.distillation.teaching.encoding import DecodingError, decode, encode
from mergekit_lite.distillation.teaching.rows import TaughtRow
from mergekit_lite.errors import UnreadableError
from mergekit_lite.input_files import opened, read_bytes

SUFFIX, INDEX = ".taught", ".index"
MAGIC, INDEX_MAGIC = b"taught1\n", b"tindex1\n"
RECORD = struct.Struct("<II16sd")  # bytes of the encoded row, tokens, key, Σ −log p
DIGEST = 8  # bytes
HEAD = len(MAGIC) + DIGEST  # bytes before the first record
MOST_BYTES = 1 << 31  # of an encoded row
FULL_ROWS, FULL_BYTES = 1 << 13, 1 << 26  # from either on, the next row begins another file

ENTRY = np.dtype(
    [
        ("high", "<u8"),  # the key's first half
        ("low", "<u8"),
        ("place", "<u8"),  # of the record, in bytes
        ("bytes", "<u4"),  # of the encoded row
        ("tokens", "<u4"),
        ("shard", "<u4"),  # its number
        ("loss", "<f8"),  # Σ −log p
    ]
)
Entries = npt.NDArray[Any]  # of ENTRY


class Scan(NamedTuple):
    """The whole records of a file, and where they end."""

    entries: Entries
    end: int
    size: int  # of the file


def head_of(settings: bytes) -> bytes:
    """Return the begin of each file of a teacher with these settings."""
    return MAGIC + xxh3_64_digest(settings)


def record_of(row: TaughtRow, vocabulary: int) -> bytes:
    """Return a row as a record. Raises ValueError as ``encode`` does, and for a key that is none."""
    body, key = encode(row, vocabulary), bytes.fromhex(row.key)
    if len(key) != 16:
        raise ValueError(f"the key {row.key!r} is none")
    loss = -float(row.log_probs.sum(dtype="float64"))
    record = RECORD.pack(len(body), len(row.tokens), key, loss) + body
    return record + xxh3_64_digest(record)


def entry_of(row: TaughtRow, record: bytes, number: int, place: int) -> Entries:
    """Return the entry of a record at a place of the file with this number."""
    nbytes, tokens, key, loss = RECORD.unpack_from(record)
    return np.array([(*halves(key), place, nbytes, tokens, number, loss)], ENTRY)


def halves(key: bytes) -> tuple[int, int]:
    """Return both halves of a key as numbers."""
    return int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")


def key_of(entry: Any) -> str:
    """Return the key of an entry."""
    return f"{int(entry['high']):016x}{int(entry['low']):016x}"


def load(path: Path, head: bytes) -> Scan:
    """Return the entries of a file: from its index, where it has one that fits, else read in full.

    Raises:
        UnreadableError: it can't be read, or is no such file, or that of other settings.
    """
    with opened(path) as file:
        size = path.stat().st_size
        _check_head(path, file.read(HEAD), head)
        entries = _index(path, size)
        if entries is not None:
            return Scan(entries, size, size)
        found = list(_records(file, int(path.stem)))
        entries = np.array(found, ENTRY)
        end = HEAD if not found else int(entries[-1]["place"]) + _length(int(entries[-1]["bytes"]))
        return Scan(entries, min(end, size), size)


def row_at(path: Path, entry: Any, likeliest: bool = True) -> TaughtRow:
    """Read the row of an entry, with the ``likeliest`` tokens or without.

    Raises:
        UnreadableError: it can't be read, or isn't what was written.
    """
    length = _length(int(entry["bytes"]))
    try:
        with opened(path) as file:
            file.seek(int(entry["place"]))
            record = file.read(length)
    except OSError as error:
        raise UnreadableError(path, f"can't be read: {error.strerror}") from error
    if len(record) < length or xxh3_64_digest(record[:-DIGEST]) != record[-DIGEST:]:
        raise UnreadableError(path, f"is damaged at byte {int(entry['place']):,}: delete it, and teach again")
    try:
        row = decode(record[RECORD.size : -DIGEST], key_of(entry), likeliest=likeliest)
    except DecodingError as error:
        raise UnreadableError(path, f"has a row at byte {int(entry['place']):,} that is none: {error}") from error
    return row


def write_index(path: Path, entries: Entries, size: int) -> None:
    """Write the index of a full file. Raises RunError."""
    content = INDEX_MAGIC + struct.pack("<QQ", size, len(entries)) + entries.tobytes()
    write_lines(path.with_suffix(INDEX), [content, xxh3_64_digest(content)])


def _index(path: Path, size: int) -> Entries | None:
    """Return the entries of a file's index; None where there is none that fits a file of this size."""
    index = path.with_suffix(INDEX)
    if not index.exists():
        return None
    content = read_bytes(index)
    start = len(INDEX_MAGIC) + 16
    if len(content) < start + DIGEST or xxh3_64_digest(content[:-DIGEST]) != content[-DIGEST:]:
        return None
    told, count = struct.unpack_from("<QQ", content, len(INDEX_MAGIC))
    if not content.startswith(INDEX_MAGIC) or told != size or len(content) != start + count * ENTRY.itemsize + DIGEST:
        return None
    entries: Entries = np.frombuffer(content, ENTRY, count, start).copy()
    if count and int((entries["place"] + entries["bytes"]).max()) > size:
        return None
    entries["shard"] = int(path.stem)
    return entries


def _check_head(path: Path, found: bytes, head: bytes) -> None:
    """Raise UnreadableError where a file begins otherwise; less than a begin is what a kill left."""
    if found == head[: len(found)]:
        return
    if not found.startswith(MAGIC[: len(found)]):
        raise UnreadableError(path, "is no file of a teacher's distributions")
    raise UnreadableError(path, "was made by another teacher, or with other settings, than this folder's teacher.json")


def _records(file: BinaryIO, number: int) -> Iterator[tuple[Any, ...]]:
    """Yield the entries of the records from the place of an open file on, up to the first that isn't whole."""
    place = HEAD
    while len(head := file.read(RECORD.size)) == RECORD.size:
        nbytes, tokens, key, loss = RECORD.unpack(head)
        if nbytes > MOST_BYTES:
            return
        rest = file.read(nbytes + DIGEST)
        if len(rest) < nbytes + DIGEST or xxh3_64_digest(head + rest[:-DIGEST]) != rest[-DIGEST:]:
            return
        yield (*halves(key), place, nbytes, tokens, number, loss)
        place += _length(nbytes)


def _length(nbytes: int) -> int:
    return RECORD.size + nbytes + DIGEST
