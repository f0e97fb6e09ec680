"""A folder of what one teacher says: rows found by their key, added one by one, never lost to a kill.

``teacher.json`` says what made them: rows of another teacher, tokenizer or settings are never in one folder. The rows
are in files of some thousands (``shard.py``). Of a row, memory holds 44 bytes: a million take as much as one
embedding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mergekit_lite.answers.rows import not_written
from mergekit_lite.distillation.settings import hold_settings
from mergekit_lite.distillation.teaching import shard
from mergekit_lite.distillation.teaching.rows import TaughtRow
from mergekit_lite.errors import RunError, UnreadableError
from mergekit_lite.input_files import read_json
from mergekit_lite.locks import lock_file

SETTINGS = "teacher.json"
LOCK = ".lock"
FORMAT = 1
NUMBER = re.compile(r"[0-9]{5,9}")  # of a shard


def is_taught(folder: Path) -> bool:
    """Return whether a folder is one of a teacher's rows."""
    return (folder / SETTINGS).is_file()


class TaughtFile:
    """The rows in a folder. ``with_settings`` opens one to add rows.

    Any number of processes may read while one adds; they see what was there when they opened it.

    Attributes:
        folder: the folder.
        settings: what made the rows: ``teacher``, ``vocabulary`` (a number that all ids are below), ``top`` (the
            likeliest tokens kept of each position) and others.
        notes: of bytes in its files that are left out.
    """

    def __init__(self, folder: str | Path):
        """Open a folder for reading.

        Raises:
            UnreadableError: it is none of a teacher's rows, or they can't be read.
        """
        self.folder = Path(folder)
        self.settings = _settings(self.folder / SETTINGS)
        self._head = shard.head_of(json.dumps(self.settings, sort_keys=True).encode())
        self._lock: BinaryIO | None = None
        self._file: BinaryIO | None = None  # the last shard, open for appending
        self._end = 0  # of its records
        scans = {path: shard.load(path, self._head) for path in self._paths()}
        self._entries = _sorted([scan.entries for scan in scans.values()])
        self.notes = [
            f"{path}: the last {scan.size - scan.end:,} bytes are no whole row, as a kill leaves it, or damaged: what "
            "is in them is left out, and the stage `teach` asks for it again"
            for path, scan in scans.items()
            if scan.end < scan.size
        ]
        self._new: dict[str, Any] = {}  # entries of the shard that is written, by key

    @classmethod
    def with_settings(cls, folder: Path, settings: Mapping[str, Any]) -> TaughtFile:
        """Open a folder to add rows, which is made where it is missing.

        Args:
            folder: the folder.
            settings: see ``settings``; ``teacher``, ``vocabulary`` and ``top`` at least.

        Raises:
            UsageError: there are rows that were made with other settings; it says what differs.
            UnreadableError: as the class.
        """
        refusal = f"What {folder.name} said in {folder} was said in another way" if any(_shards(folder)) else None
        advice = f"Set it back; or give this teacher another name; or, to ask again, delete {folder}."
        held = {"format": FORMAT, **settings}
        hold_settings(folder / SETTINGS, held, "distributions", refusal, advice)
        return cls(folder)

    def __contains__(self, key: str) -> bool:
        return self._entry(key) is not None

    def __len__(self) -> int:
        return len(self._entries) + len(self._new)

    def __iter__(self) -> Iterator[TaughtRow]:
        """Yield all rows, file by file in the order in which they were added."""
        entries = np.concatenate([self._entries, *self._new.values()])
        for entry in entries[np.lexsort((entries["place"], entries["shard"]))]:
            yield self._row(entry)

    def get(self, key: str, *, likeliest: bool = True) -> TaughtRow | None:
        """Return the row with a key of ``row_key``; None where there is none. Raises UnreadableError.

        Without ``likeliest`` it has the text's own tokens alone (its K is 0), and takes little time.
        """
        entry = self._entry(key)
        return None if entry is None else self._row(entry, likeliest)

    def keys(self) -> Iterator[str]:
        """Yield the keys of all rows, in no order."""
        yield from map(shard.key_of, self._entries)
        yield from self._new

    @property
    def tokens(self) -> int:
        """The number of tokens of all rows."""
        return int(self._sum("tokens"))

    @property
    def nbytes(self) -> int:
        """The bytes of the rows on the disk."""
        return sum(path.stat().st_size for path in self._paths())

    @property
    def cross_entropy(self) -> float:
        """−mean log p of a token, in nats, over all rows; NaN where there are none."""
        return self._sum("loss") / self.tokens if self.tokens else float("nan")

    def facts(self) -> dict[str, Any]:
        """Return what is in the folder as plain data: the settings and figures over all rows."""
        tokens = self.tokens
        known = ("teacher", "served", "system", "dtype", "vocabulary", "top")
        return {
            **{key: value for key in known if isinstance(value := self.settings.get(key), str | int)},
            "rows": len(self),
            "tokens": tokens,
            "bytes_a_token": self.nbytes / tokens if tokens else None,
            "cross_entropy": self.cross_entropy if tokens else None,
        }

    def append(self, rows: Iterable[TaughtRow]) -> None:
        """Add rows whose keys aren't there; when this returns, a kill of the process doesn't lose them.

        Raises:
            RunError: another process adds rows, or they can't be written.
            ValueError: an array of a row is none of such a row.
        """
        try:
            for row in rows:
                if row.key not in self:
                    self._append(row)
        except OSError as error:
            raise not_written(self.folder, error) from error

    def close(self) -> None:
        """Release the folder to other processes that add rows."""
        for file in (self._file, self._lock):
            if file is not None:
                with suppress(OSError):
                    file.close()
        self._file = self._lock = None

    def __enter__(self) -> TaughtFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, row: TaughtRow) -> None:
        record = shard.record_of(row, self.settings["vocabulary"])
        file, number = self._open()
        try:
            written = 0
            while written < len(record):
                written += file.write(record[written:])
        except OSError:
            with suppress(OSError):  # the next one who opens it does the same
                file.truncate(self._end)
            raise
        self._new[row.key] = shard.entry_of(row, record, number, self._end)
        self._end += len(record)
        if len(self._new) >= shard.FULL_ROWS or self._end >= shard.FULL_BYTES:
            self._finish()

    def _finish(self) -> None:
        """End the shard that is written, with its index."""
        assert self._file is not None
        self._file.close()
        self._file = None
        entries = np.concatenate(list(self._new.values()))
        shard.write_index(self._path(int(entries[0]["shard"])), entries, self._end)
        self._entries = _sorted([self._entries, entries])
        self._new = {}

    def _open(self) -> tuple[BinaryIO, int]:
        """Return the last shard, open for appending after its last whole record, and its number."""
        if self._lock is None:
            self._take_lock()
        paths = self._paths()
        if self._file is not None:
            return self._file, int(paths[-1].stem)
        number = int(paths[-1].stem) if paths else 0
        scan = shard.load(paths[-1], self._head) if paths else None
        if scan is not None and (len(scan.entries) >= shard.FULL_ROWS or scan.end >= shard.FULL_BYTES):
            if scan.end == scan.size:
                shard.write_index(paths[-1], scan.entries, scan.end)
            number, scan = number + 1, None
        file = self._path(number).open("ab", buffering=0)
        begin = 0 if scan is None or scan.size < shard.HEAD else scan.end
        file.truncate(begin)
        if not begin:
            file.write(self._head)
        self._file, self._end = file, max(begin, shard.HEAD)
        if scan is not None:  # its rows are counted with those that will be added to it
            self._entries = self._entries[self._entries["shard"] != number]
            self._new = {shard.key_of(entry): np.array([entry], shard.ENTRY) for entry in scan.entries}
        return file, number

    def _take_lock(self) -> None:
        self._lock = lock_file(self.folder / LOCK)
        if self._lock is None:
            raise RunError(f"{self.folder}: another process adds rows to it. Wait for it, or stop it.")
        # Another process may have added rows since this folder was opened.
        self._entries = _sorted([shard.load(path, self._head).entries for path in self._paths()])

    def _entry(self, key: str) -> Any:
        if key in self._new:
            return self._new[key][0]
        try:
            high, low = shard.halves(bytes.fromhex(key))
        except ValueError:
            return None
        place = int(np.searchsorted(self._entries["high"], np.uint64(high)))
        while place < len(self._entries) and self._entries["high"][place] == high:
            if self._entries["low"][place] == low:
                return self._entries[place]
            place += 1
        return None

    def _row(self, entry: Any, likeliest: bool = True) -> TaughtRow:
        return shard.row_at(self._path(int(entry["shard"])), entry, likeliest)

    def _sum(self, field: str) -> Any:
        return self._entries[field].sum(dtype=np.float64 if field == "loss" else np.int64).item() + sum(
            entry[0][field].item() for entry in self._new.values()
        )

    def _paths(self) -> list[Path]:
        return sorted(_shards(self.folder))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}{shard.SUFFIX}"


def _shards(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob(f"*{shard.SUFFIX}") if NUMBER.fullmatch(path.stem))


def _sorted(entries: Iterable[shard.Entries]) -> shard.Entries:
    """Return entries by key; of those with the same key the first."""
    merged = np.concatenate([np.empty(0, shard.ENTRY), *entries])
    merged = merged[np.lexsort((merged["low"], merged["high"]))]
    again = (merged["high"][1:] == merged["high"][:-1]) & (merged["low"][1:] == merged["low"][:-1])
    return merged[np.concatenate([[True], ~again])] if len(merged) else merged


def _settings(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    for name in ("vocabulary", "top"):
        if type(settings.get(name)) is not int or not 0 <= settings[name] <= 1 << 31:
            raise UnreadableError(path, f"says nothing of {name!r} that could be one: expected a whole number")
    if settings.get("format") != FORMAT:
        raise UnreadableError(path, f"is of the format {settings.get('format')!r}, known is {FORMAT}")
    return settings
