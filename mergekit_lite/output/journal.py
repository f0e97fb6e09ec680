"""Journal: the spans that are already written, so that a killed run can go on where it stopped.

Each line is one JSON value. The first names the plan and the input files. Each further one is a span of elements, whose
bytes were written before its line. A line that was cut off by a kill is dropped. Bytes are trusted only after their
digest is checked again, so it does not matter in which order the system brought data and journal to the disk.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lite.errors import RunError, listing


class Record(NamedTuple):
    """One finished span of one output tensor."""

    job: int  # its index in the plan
    begin: int  # first element of the span
    inputs: Sequence[str]  # digest of the span's bytes in each input
    output: str  # digest of the span's bytes in the output
    sums: Sequence[float]  # the sums that the method observes, and last the number of elements in them
    bad: Sequence[int]  # indices of the inputs that held NaN or infinity; -1 where only the output did
    coefficients: Sequence[float] = ()  # each model's, from the method's statistics; in a tensor's first span


class RecordTable(MutableMapping[tuple[int, int], Record]):
    """Records by job and first element, each pickled: as objects they would take three times the memory."""

    def __init__(self) -> None:
        self._pickled: dict[tuple[int, int], bytes] = {}

    def __getitem__(self, key: tuple[int, int]) -> Record:
        return Record(*pickle.loads(self._pickled[key]))

    def __setitem__(self, key: tuple[int, int], record: Record) -> None:
        self._pickled[key] = pickle.dumps(tuple(record), pickle.HIGHEST_PROTOCOL)

    def __delitem__(self, key: tuple[int, int]) -> None:
        del self._pickled[key]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._pickled)

    def __len__(self) -> int:
        return len(self._pickled)


class Journal:
    """The journal of one output, open for appending from many threads; started where there is none.

    ``sources`` are path, size and time of every input file. Raises RunError where the journal belongs to another plan,
    or an input changed.
    """

    def __init__(self, path: Path, plan_digest: str, sources: Sequence[tuple[str, int, int]]) -> None:
        head = {"plan": plan_digest, "sources": [list(source) for source in sources]}
        self.records = RecordTable()
        self._lock = threading.Lock()
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        values = [_parsed(line) for line in lines[:-1]]
        if values:
            _check_head(path, values[0], head)
        for fields in values[1:]:
            if isinstance(fields, list) and len(fields) == len(Record._fields):
                record = Record(*fields)
                self.records[record.job, record.begin] = record
        # Rewritten, not appended to: after a torn line the next one would be unreadable.
        text = "".join(json.dumps(line) + "\n" for line in [head, *self.records.values()])
        temporary = path.with_suffix(".new")
        temporary.write_text(text)
        temporary.replace(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, record: Record) -> None:
        """Append a finished span."""
        line = (json.dumps(record) + "\n").encode()
        with self._lock:
            os.write(self._descriptor, line)
            self.records[record.job, record.begin] = record

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def plan_of(path: Path) -> str | None:
    """Return the digest of the plan that a journal belongs to; None where there is no journal that tells."""
    try:
        with path.open("rb") as file:
            head = _parsed(file.readline())
    except OSError:
        return None
    plan = head.get("plan") if isinstance(head, dict) else None
    return plan if isinstance(plan, str) else None


def _check_head(path: Path, first_line: object, head: dict[str, Any]) -> None:
    if not isinstance(first_line, dict) or first_line.get("plan") != head["plan"]:
        another = "holds an unfinished run of another plan (other models, options or version)"
        raise RunError(f"{path.parent}: {another}. --force starts over.")
    changed = [source[0] for source in head["sources"] if source not in first_line.get("sources", ())]
    if changed:
        title = f"{path.parent}: inputs that changed since the run was stopped; --force starts over"
        raise RunError(listing(title, changed))


def _parsed(line: bytes) -> object:
    """Return a line's value, None where it is torn."""
    try:
        return json.loads(line)
    except ValueError:
        return None
