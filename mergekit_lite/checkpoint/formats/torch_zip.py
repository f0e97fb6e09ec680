"""The zip that ``torch.save`` writes: its records located, and tensors in them checked against their lengths.

NAME/data.pkl        a pickle: the saved object, in which a tensor is a storage's key, an offset, sizes and strides
NAME/data/KEY        the bytes of one storage, which several tensors may share
NAME/byteorder, …    short notes
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.strided import Strided
from mergekit_lite.checkpoint.tensor import PLAIN, TensorSpec
from mergekit_lite.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30  # of a zip record, before its name and extra field


class Record(NamedTuple):
    """The data of one record: the byte of the file at which it begins, and how many there are."""

    offset: int
    length: int


def read_records(file: IO[bytes], where: object) -> tuple[bytes, dict[str, Record]]:
    """Return a zip's pickle, and each storage's record by its name in the zip's folder, if it is as torch writes it.

    Raises CheckpointError where it is compressed or big-endian; ``zipfile``'s errors, and others, where it is damaged.
    """
    if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
        raise zipfile.BadZipFile("no zip file")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        members = {entry.filename.partition("/")[2]: entry for entry in entries}
        if len(members) != len(entries):
            raise zipfile.BadZipFile("two records have the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(f"{where}: is a compressed zip; torch.save never writes one. Refused.")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise CheckpointError(
                f"{where}: was written on a big-endian machine. Save it again on a little-endian one."
            )
        return archive.read(members["data.pkl"]), {
            name: _record(file, entry) for name, entry in members.items() if name.startswith("data/")
        }


def _record(file: IO[bytes], entry: zipfile.ZipInfo) -> Record:
    # The lengths of name and extra field are read from the record itself: the directory's may be others.
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER_BYTES)
    if len(header) < LOCAL_HEADER_BYTES or header[:4] != ZIP_MAGIC or entry.compress_size != entry.file_size:
        raise zipfile.BadZipFile("the directory and a record don't agree")
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return Record(entry.header_offset + LOCAL_HEADER_BYTES + name_length + extra_length, entry.file_size)


def spec_in_record(
    path: Path, name: str, dtype: str, shape: Sequence[int], strides: Sequence[int], start: int, record: Record
) -> TensorSpec:
    """Return the place of a tensor whose first element is element ``start`` of a record, once that is long enough.

    Raises CheckpointError where it isn't: shape, strides and start are what a file says, which may be forged.
    """
    size = dtypes.size(dtype)
    # The distance from the first element to the one behind the last, by the strides.
    reach = 1 + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    if 0 not in shape and (start + reach) * size > record.length:
        raise CheckpointError(
            f"{path}: tensor {name!r} takes bytes {start * size:,} to {(start + reach) * size:,} of a record of "
            f"{record.length:,}. The file is damaged or forged, or its zip isn't torch's."
        )
    encoding = PLAIN if _is_contiguous(shape, strides) else Strided(tuple(strides))
    return TensorSpec(name, dtype, tuple(shape), path, record.offset + start * size, encoding)


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1:
            if step != expected:
                return 0 in shape
            expected *= length
    return True


class Region(io.RawIOBase):
    """A part of an open file, as a file: what ``torch.distributed.checkpoint`` keeps each tensor in."""

    def __init__(self, file: IO[bytes], begin: int, length: int) -> None:
        self._file = file
        self._begin = begin
        self._length = length
        self._position = 0

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte of the part."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise OSError("before the part of the file")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        """Return the byte that is read next."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes, none beyond the part's end."""
        room = max(0, self._length - self._position)
        self._file.seek(self._begin + self._position)
        data = self._file.read(room if size < 0 else min(size, room))
        self._position += len(data)
        return data


def records_within(file: IO[bytes], begin: int, length: int, where: object) -> tuple[bytes, dict[str, Record]]:
    """Return what ``read_records`` does of a zip that is a part of a file, with offsets in the file."""
    pickled, records = read_records(Region(file, begin, length), where)  # type: ignore[arg-type]
    return pickled, {name: Record(begin + record.offset, record.length) for name, record in records.items()}


def is_within(records: Mapping[str, Record], begin: int, length: int) -> bool:
    """Return whether all records lie within a part of a file."""
    return all(begin <= at and at + size <= begin + length for at, size in records.values())
