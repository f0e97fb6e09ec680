"""Journal: the spans that are already written, so that a killed run can go on where it stopped.

Each line is one JSON value. The first names the plan and the input files. Each further one is a span of elements, whose
bytes were written before its line, and ends with a seal: a digest of the line and the plan. A line that was cut off by
a kill, changed, or written for another plan is dropped, and its work done again. Bytes are trusted only after their
digest is checked again, so it does not matter in which order the system brought data and journal to the disk.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mergekit_lite import positioned
from mergekit_lite.errors import GOES_ON, OF_ANOTHER_PLAN, RunError, listing
from mergekit_lite.output.working_folder import NEW_JOURNAL, open_own

LONGEST_LINE = 1 << 26  # bytes; the head of a run with a hundred thousand input files is shorter
LARGEST = 1 << 32  # bytes of a whole journal
PIECE = 1 << 10  # bytes read back at once; nearly all lines are shorter
SEALED = len(', "0123456789abcdef"]\n')  # bytes; of what a seal adds to a record's text


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
    explained: Sequence[float] = ()  # along, total and bound (``contract.Explained``); in a tensor's first span


class Journal(Mapping[tuple[int, int], Record]):
    """The journal of one output, open for appending from many threads; started where there is none.

    It maps the job and the first element of each finished span to its record. The records are in the file alone: in
    memory is where the line of each begins, eight bytes for each tensor and some for each further span of a large one,
    and ``bad``, which are those that tell of NaN or infinity.
    ``sources`` are path, size and time of every input file; ``tensors`` is the number of the plan's jobs.
    Raises RunError where the journal belongs to another plan, an input changed, or a line can't be read back.
    """

    def __init__(self, path: Path, plan_digest: str, sources: Sequence[tuple[str, int, int]], tensors: int) -> None:
        head = {"plan": plan_digest, "sources": [list(source) for source in sources]}
        self.path = path
        self.plan_digest = plan_digest
        self._first = array("Q", bytes(8 * tensors))  # where the line of a tensor's first span begins; 0 for none
        self._further: dict[tuple[int, int], int] = {}  # the same of spans that begin at a later element
        self.bad: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        lines = _lines(path)
        if (first_line := next(lines, None)) is not None:
            _check_head(path, _parsed(first_line), head)
        # Rewritten, not appended to: after a torn line the next one would be unreadable.
        temporary = path.with_name(NEW_JOURNAL)
        with os.fdopen(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            self._end = file.write(json.dumps(head).encode() + b"\n")
            for line in lines:
                if (record := _sealed_record(line, plan_digest)) is not None and record.job < tensors:
                    self._note(record, self._end)
                    self._end += file.write(line)
        temporary.replace(path)
        self._descriptor = open_own(path, os.O_RDWR)

    def __getstate__(self) -> dict[str, Any]:
        """Return what reads the records that are there now, in another process."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_descriptor")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock(), _descriptor=open_own(state["path"], os.O_RDONLY))

    def add(self, record: Record) -> None:
        """Append a finished span. Raises OSError."""
        line = memoryview(_sealed(json.dumps(record).encode(), self.plan_digest))
        with self._lock:
            place = self._end
            while line:
                written = positioned.write(self._descriptor, line, self._end)
                self._end += written
                line = line[written:]
            self._note(record, place)

    def take_over(self, line: bytes) -> Record | None:
        """Append a line of another journal of the same plan; return its record, None where it is no such line."""
        record = _sealed_record(line, self.plan_digest)
        if record is None or record.job >= len(self._first):
            return None
        self.add(record)
        return record

    def line(self, key: tuple[int, int]) -> bytes:
        """Return the line of a finished span, with its seal. Raises KeyError and RunError."""
        return _sealed(json.dumps(self[key]).encode(), self.plan_digest)

    def clear(self) -> None:
        """Forget all records."""
        self._first = array("Q", bytes(8 * len(self._first)))
        self._further.clear()
        self.bad.clear()

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __getitem__(self, key: tuple[int, int]) -> Record:
        job, begin = key
        place = self._further[key] if begin else self._first[job]
        if not place:
            raise KeyError(key)
        if (text := _unsealed(self._line(place), self.plan_digest)) is None:
            raise RunError(f"{self.path}: was changed while the run went on. {GOES_ON}")
        return Record(*json.loads(text))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from ((job, 0) for job, place in enumerate(self._first) if place)
        yield from self._further

    def __len__(self) -> int:
        return sum(map(bool, self._first)) + len(self._further)

    def _note(self, record: Record, place: int) -> None:
        """Note where a record's line begins."""
        note_or_forget = self.bad.add if record.bad else self.bad.discard
        note_or_forget((record.job, record.begin))
        if record.begin:
            self._further[record.job, record.begin] = place
        else:
            self._first[record.job] = place

    def _line(self, place: int) -> bytes:
        """Return the line that begins at a byte of the file. Raises RunError."""
        line, file = b"", self._descriptor
        try:
            while not line.endswith(b"\n") and (piece := positioned.read_bytes(file, PIECE, place + len(line))):
                line += piece[: piece.find(b"\n") + 1 or None]
        except OSError as error:
            raise RunError(f"{self.path}: can't be read back: {error.strerror}. {GOES_ON}") from error
        return line


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
        raise RunError(f"{path.parent}: {OF_ANOTHER_PLAN}")
    then = first_line.get("sources")
    changed = [source[0] for source in head["sources"] if not isinstance(then, list) or source not in then]
    if changed:
        title = f"{path.parent}: inputs that changed since the run was stopped; --force starts over"
        raise RunError(listing(title, changed))


def _sealed_record(line: bytes, plan_digest: str) -> Record | None:
    """Return the record that a line holds; None where it isn't what a run of this plan wrote."""
    fields = _parsed(_unsealed(line, plan_digest) or b"")
    if not isinstance(fields, list) or len(fields) != len(Record._fields):
        return None
    record = Record(*fields)
    numbers = [(record.sums, float), (record.bad, int), (record.coefficients, float)]
    numbers += [(record.squared_error, float), (record.explained, float)]
    is_typed = (
        _are((record.job, record.begin), int)
        and record.job >= 0
        and _are((record.output,), str)
        and isinstance(record.inputs, list)
        and _are(record.inputs, str)
        and all(isinstance(values, list) and _are(values, kind) for values, kind in numbers)
    )
    return record if is_typed else None


def _are(values: Sequence[object], kind: type) -> bool:
    """Return whether all values are of a kind; a whole number is a float, too, but a truth value is no number."""
    kinds = (float, int) if kind is float else kind
    return all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)


def _sealed(text: bytes, plan_digest: str) -> bytes:
    """Return the line of a record, which is given as the text of a JSON array: with its seal as the last member."""
    return b'%b, "%b"]\n' % (text[:-1], _seal(text, plan_digest))


def _unsealed(line: bytes, plan_digest: str) -> bytes | None:
    """Return the text that ``_sealed`` made a line of; None where it made none of it for this plan."""
    text = line[:-SEALED] + b"]"
    return text if line == _sealed(text, plan_digest) else None


def _seal(text: bytes, plan_digest: str) -> bytes:
    return xxhash.xxh3_64_hexdigest(f"{plan_digest} ".encode() + text).encode()


def _parsed(line: bytes) -> object:
    """Return a line's value, None where it is torn or no run's."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
