"""What references name, however they are written: ``./b``, ``b/`` and a link to ``b`` are one model of a recipe."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

PIECE = re.compile(r"[^+:=>]+")  # between the signs of which references are made


def place(reference: str, documents: Collection[str] = ()) -> str:
    """Return a reference with its files and folders as they are opened: by their paths, links followed.

    What isn't on this disk stays as it is written, and so do names of ``documents``, which go before files.
    """

    def found(text: str) -> str:
        with suppress(OSError, RuntimeError):  # too long a name, no home: whoever opens it tells
            if text and text not in documents and (path := Path(text).expanduser()).exists():
                return str(path.resolve())
        return text

    whole = found(reference)
    return whole if whole != reference else PIECE.sub(lambda piece: found(piece[0]), reference)
