"""The journal: what is already safely written, so that a killed run can go on where it stopped.

One JSON value a line. The first names the plan; each further one is a span of elements whose output bytes were written
before the line was. A line that was cut off by the kill is dropped. Bytes are trusted only after their digest is
checked again, so it does not matter in which order the system brought data and journal to the disk.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_lite.errors import RunError


class Record(NamedTuple):
    """One finished span of one output tensor.

    Attributes:
        job: index of the job in the plan.
        begin: first element of the span.
        inputs: digest of the span's bytes in each input.
        output: digest of the span's bytes in the output.
        sums: what the method observed, and last how many elements it looked at.
        bad: indices of the inputs that held NaN or infinity; -1 where only the output did.
    """

    job: int
    begin: int
    inputs: Sequence[str]
    output: str
    sums: Sequence[float]
    bad: Sequence[int]


class Journal:
    """The journal of one output, open for appending from many threads."""

    def __init__(self, path: Path, plan_digest: str) -> None:
        """Open or start the journal at ``path``. Raises RunError where it belongs to another plan."""
        self.records: dict[tuple[int, int], Record] = {}
        self._lock = threading.Lock()
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        found = [_parsed(line) for line in lines[:-1]]
        if found and found[0] != {"plan": plan_digest}:
            raise RunError(
                f"{path.parent}: holds an unfinished run of another plan: other options, another version, or inputs "
                "that changed since. Start afresh with --force, or remove the folder."
            )
        for fields in found[1:]:
            if isinstance(fields, list) and len(fields) == len(Record._fields):
                record = Record(*fields)
                self.records[record.job, record.begin] = record
        # Rewritten rather than cut at the damage: what follows a torn line would be unreadable next time.
        text = "".join(json.dumps(line) + "\n" for line in [{"plan": plan_digest}, *self.records.values()])
        temporary = path.with_suffix(".new")
        temporary.write_text(text)
        temporary.replace(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, record: Record) -> None:
        """Note a finished span."""
        line = (json.dumps(record) + "\n").encode()
        with self._lock:
            os.write(self._descriptor, line)
            self.records[record.job, record.begin] = record

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None
