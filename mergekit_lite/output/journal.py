"""The journal: what is already safely written, so that a killed run can go on where it stopped.

One JSON object a line. The first names the plan; each further one a span of elements whose output bytes were written
before the line was. A line that was cut off by the kill is dropped. Bytes are trusted only after their digest is
checked again, so it does not matter in which order the system brought data and journal to the disk.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.errors import RunError


@dataclass(frozen=True, slots=True)
class Record:
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
    sums: Sequence[float] = field(default_factory=tuple)
    bad: Sequence[int] = field(default_factory=tuple)


class Journal:
    """The journal of one output, open for appending from many threads."""

    def __init__(self, path: Path, plan_digest: str) -> None:
        """Open or start the journal at ``path``. Raises RunError where it belongs to another plan."""
        self.records: dict[tuple[int, int], Record] = {}
        self._lock = threading.Lock()
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = [parsed for line in lines[:-1] if (parsed := _parsed(line)) is not None]
        if whole and whole[0].get("plan") != plan_digest:
            raise RunError(
                f"{path.parent}: holds an unfinished run of another plan: other options, another version, or inputs "
                "that changed since. Start afresh with --force, or remove the folder."
            )
        for fields in whole[1:]:
            record = Record(**fields)
            self.records[record.job, record.begin] = record
        # Rewritten rather than cut at the damage: what follows a torn line would be unreadable next time.
        text = "".join(json.dumps(line) + "\n" for line in [{"plan": plan_digest}, *map(asdict, self.records.values())])
        temporary = path.with_suffix(".new")
        temporary.write_text(text)
        temporary.replace(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, record: Record) -> None:
        """Note a finished span."""
        line = (json.dumps(asdict(record)) + "\n").encode()
        with self._lock:
            os.write(self._descriptor, line)
            self.records[record.job, record.begin] = record

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
