"""Standard streams that can't fail a command: what is made stays made, even if nobody can be told of it."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from typing import Any, TextIO

IN_ASCII = {"→": "->", "←": "<-", "▸": ">", "─": "-", "━": "-", "−": "-", "–": "-", "…": "...", "×": "x", "·": ".",
            "√": "sqrt", "≤": "<=", "≥": ">=", "±": "+-", "≈": "~", "‖": "||", "’": "'", "“": '"',
            "”": '"'}  # fmt: skip


def in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Handle characters that a console's encoding lacks: Greek letters are named, others look alike or are ``?``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    name = unicodedata.name(character, "").split()
    if name[:1] == ["GREEK"] and name[2:3] == ["LETTER"]:
        return name[3].lower() if name[1] == "SMALL" else name[3].title()
    letter = unicodedata.normalize("NFKD", character)[0]  # of one with an accent
    return IN_ASCII.get(character) or (letter if letter.isascii() else "?")


codecs.register_error("mergekit_lite.in_ascii", in_ascii)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="mergekit_lite.in_ascii")
    out, err = (
        GuardedStream(stream if stream is not None else open(number, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    sys.stdout, sys.stderr = out, err
    return out, err
