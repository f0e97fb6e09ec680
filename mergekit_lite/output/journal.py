"""Journal: the spans that are already written, so that a killed run can go on where it stopped.

Each line is one JSON value. The first names the plan and the input files. Each further one is a span of elements, whose
bytes were written before its line, and ends with a seal: a digest of the line and the plan. A line that was cut off by
a kill, changed, or written for another plan is dropped, and its work done again. Bytes are trusted only after their
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

import xxhash

from mergekit_lite.errors import RunError, listing
from mergekit_lite.output.working_folder import NEW_JOURNAL, open_own, write_own

LONGEST_LINE = 1 << 26  # bytes; the head of a run with a hundred thousand input files is shorter
MOST_ELEMENTS = 1 << 48  # of a tensor
LARGEST = 1 << 32  # bytes of a whole journal


class Record(NamedTuple):
    """One finished span of one output tensor."""

    job: int  # its index in the plan
    begin: int  # first element of the span
    inputs: Sequence[str]  # digest of the span's bytes in each input
    output: str  # digest of the span's bytes in the output
    sums: Sequence[float]  # the sums that the method observes, and last the number of elements in them
    bad: Sequence[int]  # indices of the inputs that held NaN or infinity; -1 where only the output did
    coefficients: Sequence[float] = ()  # each model's, from the method's statistics; in a tensor's first span
    device: str = ""  # the kind of device that made it, where the last bits depend on that
    squared_error: Sequence[float] = ()  # of FP8: the sums of squares of what quantising changed, and of the values


class RecordTable(MutableMapping[tuple[int, int], Record]):
    """Records by job and first element, each pickled: as objects they would take three times the memory.

    For the same reason a key is kept as one number.
    """

    def __init__(self) -> None:
        self._pickled: dict[int, bytes] = {}

    def __getitem__(self, key: tuple[int, int]) -> Record:
        return Record(*pickle.loads(self._pickled[_one_number(key)]))

    def __setitem__(self, key: tuple[int, int], record: Record) -> None:
        self._pickled[_one_number(key)] = pickle.dumps(tuple(record), pickle.HIGHEST_PROTOCOL)

    def __delitem__(self, key: tuple[int, int]) -> None:
        del self._pickled[_one_number(key)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (divmod(number, MOST_ELEMENTS) for number in self._pickled)

    def __len__(self) -> int:
        return len(self._pickled)


def _one_number(key: tuple[int, int]) -> int:
    job, begin = key
    return job * MOST_ELEMENTS + begin


class Journal:
    """The journal of one output, open for appending from many threads; started where there is none.

    ``sources`` are path, size and time of every input file. Raises RunError where the journal belongs to another plan,
    or an input changed.
    """

    def __init__(self, path: Path, plan_digest: str, sources: Sequence[tuple[str, int, int]]) -> None:
        head = {"plan": plan_digest, "sources": [list(source) for source in sources]}
        self.plan_digest = plan_digest
        self.records = RecordTable()
        self._lock = threading.Lock()
        lines = _lines(path)
        if (first_line := next(lines, None)) is not None:
            _check_head(path, _parsed(first_line), head)
        for line in lines:
            if (record := _record(_parsed(line), plan_digest)) is not None:
                self.records[record.job, record.begin] = record
        # Rewritten, not appended to: after a torn line the next one would be unreadable.
        temporary = path.with_name(NEW_JOURNAL)
        text = json.dumps(head) + "\n" + "".join(map(self._line, self.records.values()))
        write_own(temporary, text.encode())
        temporary.replace(path)
        self._descriptor = open_own(path, os.O_WRONLY | os.O_APPEND)

    def add(self, record: Record) -> None:
        """Append a finished span. Raises OSError."""
        line = self._line(record).encode()
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]
            self.records[record.job, record.begin] = record

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _line(self, record: Record) -> str:
        return json.dumps([*record, _seal(record, self.plan_digest)]) + "\n"


def plan_of(path: Path) -> str | None:
    """Return the digest of the plan that a journal belongs to; None where there is no journal that tells."""
    try:
        head = _parsed(next(_lines(path), b""))
    except (OSError, RunError):
        return None
    plan = head.get("plan") if isinstance(head, dict) else None
    return plan if isinstance(plan, str) else None


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the complete lines of a journal; none where there is none. Raises OSError and RunError."""
    try:
        descriptor = open_own(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size > LARGEST:
            raise RunError(f"{path}: is larger than any journal. --force starts over.")
        while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
            yield line


def _check_head(path: Path, first_line: object, head: dict[str, Any]) -> None:
    if not isinstance(first_line, dict) or first_line.get("plan") != head["plan"]:
        another = "holds an unfinished run of another plan (other models, options or version)"
        raise RunError(f"{path.parent}: {another}. --force starts over.")
    then = first_line.get("sources")
    changed = [source[0] for source in head["sources"] if not isinstance(then, list) or source not in then]
    if changed:
        title = f"{path.parent}: inputs that changed since the run was stopped; --force starts over"
        raise RunError(listing(title, changed))


def _record(fields: object, plan_digest: str) -> Record | None:
    """Return the record of a line's fields; None where they aren't what a run of this plan wrote."""
    if not isinstance(fields, list) or len(fields) != len(Record._fields) + 1:
        return None
    *values, seal = fields
    record = Record(*values)
    numbers = [(record.sums, float), (record.bad, int), (record.coefficients, float)]
    numbers.append((record.squared_error, float))
    is_typed = (
        _are((record.job, record.begin), int)
        and _are((record.output,), str)
        and isinstance(record.inputs, list)
        and _are(record.inputs, str)
        and all(isinstance(values, list) and _are(values, kind) for values, kind in numbers)
    )
    return record if is_typed and seal == _seal(record, plan_digest) else None


def _are(values: Sequence[object], kind: type) -> bool:
    """Return whether all values are of a kind; a whole number is a float, too, but a truth value is no number."""
    kinds = (float, int) if kind is float else kind
    return all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)


def _seal(record: Record, plan_digest: str) -> str:
    return xxhash.xxh3_64_hexdigest(f"{plan_digest} {json.dumps(record)}".encode())


def _parsed(line: bytes) -> object:
    """Return a line's value, None where it is torn or no run's."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
