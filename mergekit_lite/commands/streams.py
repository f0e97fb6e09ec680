"""Standard streams that can't fail a command: what is made stays made, even if nobody can be told of it."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class GuardedStream:
    """A stream whose first failed write, to a full disk or a closed pipe, ends it; what is printed later is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write text, as long as that works."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._end(error)
        return len(text)

    def flush(self) -> None:
        """Bring what was written to the system, as long as that works."""
        try:
            self._stream.flush()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        self.failure = self.failure or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # where what is still buffered goes, too
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guarded() -> tuple[GuardedStream, GuardedStream]:
    """Guard standard output and standard error, and return them; open what was closed when this process started.

    Else the first files that are opened would get the numbers of the closed streams, and libraries print to numbers.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
    out, err = (
        GuardedStream(stream if stream is not None else open(number, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    sys.stdout, sys.stderr = out, err
    return out, err
