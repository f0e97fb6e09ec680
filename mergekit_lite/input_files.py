"""Small files that others may have written: opened if they are regular, read up to a bound, held to their form.

Model folders, recipes and manifests come from strangers. A pipe would be waited for without end, a device never ends,
and JSON may be nested deeper, or hold longer numbers, than those who use it can bear.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO

from mergekit_lite.errors import UnreadableError
from mergekit_lite.positioned import open_file

MAX_BYTES = 100_000_000  # of a small file: tokenizers come to some tens of megabytes, an index of a million tensors too
MAX_DEPTH = 100  # of JSON: configs and tokenizers have less than 20
MAX_DIGITS = 250  # of a whole number: with as many, hexadecimal ones too, it fits a float
LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
STRIDE = 25  # of a long number's characters so many in a row are every 25th of the text: a short search rules most out
SPARSE_NUMBER = re.compile(rf"[0-9]{{{(MAX_DIGITS + 1) // STRIDE}}}")
CONTAINERS = frozenset((dict, list))  # the types that JSON nests
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON escapes a surrogate, be it one of a pair or alone


class StandIn(type(Path())):  # type: ignore[misc]
    """A path that stands in for a file elsewhere (``checkpoint/stores``)."""

    def elsewhere(self) -> BinaryIO | None:
        """Open what it stands for; None where the file lies here in full."""
        raise NotImplementedError


@contextmanager
def opened(path: Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Args:
        path: the file, or a link to it: whether a link may be followed is for the caller to say (``folder.inside``).
        limit: largest size in bytes; None is no limit.

    Raises:
        UnreadableError: there is no such file, it may not be read, it is a pipe, device, folder or socket, or too long.
    """
    if isinstance(path, StandIn) and (elsewhere := path.elsewhere()) is not None:
        with elsewhere:
            _check_size(path, size_of(elsewhere), limit)
            yield elsewhere
        return
    try:
        descriptor = open_file(path, os.O_RDONLY)
    except (OSError, ValueError) as error:  # a ValueError for a name that no file can have
        raise UnreadableError(path, f"can't be read: {getattr(error, 'strerror', None) or error}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnreadableError(path, "is not a regular file")
    with open(descriptor, "rb") as file:  # noqa: PTH123  (a descriptor, no path)
        _check_size(path, status.st_size, limit)
        yield file


def size_of(file: IO[bytes]) -> int:
    """Return the bytes of an opened file, which is then read from its begin."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def _check_size(path: Path, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise UnreadableError(path, f"is {size:,} bytes long; more than {limit:,} is refused")


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Return the content of a file, of at most ``limit`` bytes, by default ``MAX_BYTES``. Raises UnreadableError."""
    most = MAX_BYTES if limit is None else limit
    with opened(path, most) as file:
        try:
            content = file.read(most + 1)  # some files have more than their size says
        except OSError as error:
            raise UnreadableError(path, f"can't be read: {error.strerror}") from error
    if len(content) > most:
        raise UnreadableError(path, f"is longer than its size says; more than {most:,} bytes is refused")
    return content


def read_text(path: Path, limit: int | None = None) -> str:
    """Return the content of a UTF-8 file, without a mark of byte order. Raises UnreadableError."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(path, f"is not UTF-8 text ({error.reason} at byte {error.start:,})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds. Raises UnreadableError."""
    return json_object(path, read_bytes(path))


def json_object(path: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object in a file's content, as ``parse_json`` reads it. Raises UnreadableError."""
    try:
        parsed = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise UnreadableError(path, f"is not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise UnreadableError(path, f"should hold a JSON object, but holds a {type(parsed).__name__}")
    return parsed


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    NaN and Infinity are numbers, as in configs that Python wrote; of a key that is given twice the last value counts.

    Raises:
        ValueError: it is no JSON, is nested deeper than ``MAX_DEPTH``, has a whole number of more than ``MAX_DIGITS``
            digits, or holds half a surrogate pair, which no UTF-8 can tell.
    """
    try:
        # A call for each number of a vocabulary would take as long as all the rest.
        has_long = SPARSE_NUMBER.search(text[::STRIDE]) and LONG_NUMBER.search(text)
        content = json.loads(text, parse_int=_whole if has_long else None)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    _check_depth(content)
    if SURROGATE.search(text):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"has half a surrogate pair, U+{ord(error.object[error.start]):04X}") from None
    return content


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _check_depth(content: Any) -> None:
    """Raise ValueError where lists and objects are nested deeper than ``MAX_DEPTH``: level by level, no recursion."""
    level = [content] if type(content) in CONTAINERS else []
    for _ in range(MAX_DEPTH + 1):
        inner = chain.from_iterable(outer.values() if type(outer) is dict else outer for outer in level)
        level = [value for value in inner if type(value) in CONTAINERS]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
