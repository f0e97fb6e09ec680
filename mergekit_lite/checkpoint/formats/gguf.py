"""The header of a ``.gguf`` file, checked in full before anything in it is believed.

The format: magic, version, how many tensors and how many values; the values by key, each with its type; for each tensor
its name, sizes (the innermost first), type and offset; then the data, each tensor at a multiple of the alignment. See
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names and values are llama.cpp's: ``gguf_models`` puts them
into those of transformers.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mergekit_lite.checkpoint.encodings.ggml import GgmlBlocks, gguf_library
from mergekit_lite.checkpoint.formats.header import Header, WeightFile, check_name
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import np
from mergekit_lite.errors import CheckpointError, shortened
from mergekit_lite.input_files import opened, size_of

SUFFIXES = (".gguf",)
MODEL_NAMES: tuple[str, ...] = ()
ADAPTER_NAMES: tuple[str, ...] = ()
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 500_000_000  # vocabularies of a million tokens, with merges, come to some tens of megabytes
MAX_VALUES = 100_000  # keys; real files have less than a hundred
MAX_KEPT = 1 << 12  # elements of an array that are kept; the tokens of a vocabulary are only counted
MAX_DIMENSIONS = 4
MAX_BYTES = 2**63 - 1
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"  # bytes, unless the key says otherwise
READ_BYTES = 1 << 20
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
PLAIN_TYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


class Array(NamedTuple):
    """An array of a header: how many elements it has, and those of a short one of numbers."""

    elements: int
    numbers: tuple[float, ...] = ()


def read_header(path: Path) -> Header:
    """Read and check one file's header; ``Header.values`` has its values by key.

    Raises:
        CheckpointError: the ``gguf`` package isn't installed, or what the header says doesn't add up to the file.
    """
    library = gguf_library()
    with opened(path) as file:
        fields = _Fields(path, file, size_of(file))
        try:
            values, infos = _read(fields)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    alignment = values.get(ALIGNMENT_KEY, ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= READ_BYTES or alignment & (alignment - 1):
        raise fields.damaged(f"{ALIGNMENT_KEY} {shortened(repr(alignment), 40)} is not a power of two")
    start = _padded(fields.position, alignment)
    specs: dict[str, TensorSpec] = {}
    end = offset = start
    for info in infos:
        if info.offset != offset - start:
            raise fields.damaged(
                f"tensor {info.name!r} begins at byte {info.offset:,} of the data, expected {offset - start:,}"
            )
        specs[info.name] = _spec(fields, library, info, offset)
        end = offset + specs[info.name].nbytes
        offset = _padded(end, alignment)
        if offset > MAX_BYTES:
            raise fields.damaged(f"tensor {info.name!r} is larger than any file")
    if end > fields.size and specs:
        raise CheckpointError(
            f"{path}: its header describes {end - start:,} bytes of data, the file holds {fields.size - start:,}. "
            "It is cut short: download it again."
        )
    if fields.size > max(offset, start):
        raise fields.damaged(f"it holds {fields.size - offset:,} bytes more than its header describes")
    header = bytes(fields.data[: fields.position])
    return Header(WeightFile.identify(path, header), specs, values=values)


class _Info(NamedTuple):
    """What a header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Fields:
    """A header that is read field by field, and no further than the file goes."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.data = bytearray()
        self.position = 0
        self._file = file

    def damaged(self, what: str) -> CheckpointError:
        """Return the error for a header that can't be right."""
        return CheckpointError(f"{self.path}: a GGUF file that is cut short, damaged or forged: {what}.")

    def skip(self, count: int) -> int:
        """Go ``count`` bytes on, and return where they begin in ``data``."""
        begin, self.position = self.position, self.position + count
        if self.position > self.size:
            raise self.damaged(f"its header goes on behind byte {begin:,} of {self.size:,}")
        if self.position > MAX_HEADER_BYTES:
            raise self.damaged(f"its header claims more than {MAX_HEADER_BYTES:,} bytes")
        while len(self.data) < self.position:
            piece = self._file.read(max(READ_BYTES, self.position - len(self.data)))
            if not piece:
                raise self.damaged("it became shorter while it was read")
            self.data += piece
        return begin

    def number(self, form: str) -> Any:
        """Return the next number, of a type that ``struct`` knows."""
        layout = f"<{form}"
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def text(self, limit: int = READ_BYTES) -> str:
        """Return the next text, of at most ``limit`` bytes."""
        length: int = self.number("Q")
        if length > limit:
            raise self.damaged(f"a text of {length:,} bytes; more than {limit:,} is refused here")
        begin = self.skip(length)
        try:
            return self.data[begin : begin + length].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text at byte {begin:,} is not UTF-8") from error

    def counted(self, what: str, least: int) -> int:
        """Return the next count, of things that take ``least`` bytes each at least."""
        count: int = self.number("Q")
        if count > (self.size - self.position) // least:
            raise self.damaged(f"it claims {count:,} {what}, more than the file has room for")
        return count


def _read(fields: _Fields) -> tuple[dict[str, Any], list[_Info]]:
    """Return a header's values by key, and what it says of each tensor, in the order of the file."""
    if fields.size < len(MAGIC) or fields.data[fields.skip(len(MAGIC)) : fields.position] != MAGIC:
        raise CheckpointError(f"{fields.path}: not a GGUF file, or cut short. Download it again.")
    version = fields.number("I")
    if version not in VERSIONS:
        big = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
        why = "was written on a big-endian machine" if big else f"is of version {version}, known are 2 and 3"
        raise CheckpointError(f"{fields.path}: this GGUF file {why}. Convert the model again.")
    tensors = fields.counted("tensors", least=8 + 4 + 4 + 8)
    count = fields.counted("values", least=8 + 4 + 1)
    if count > MAX_VALUES:
        raise fields.damaged(f"it claims {count:,} values; more than {MAX_VALUES:,} is refused")
    values: dict[str, Any] = {}
    for _ in range(count):
        key = fields.text(limit=1 << 16)
        if key in values:
            raise fields.damaged(f"the key {shortened(repr(key), 80)} is there twice")
        values[key] = _value(fields, fields.number("I"))
    infos = [_info(fields) for _ in range(tensors)]
    names: set[str] = set()
    for info in infos:
        if info.name in names:
            raise fields.damaged(f"tensor {info.name!r} is there twice")
        names.add(info.name)
    return values, infos


def _value(fields: _Fields, kind: int) -> Any:
    """Return a value: a number, a text, or an ``Array``."""
    if kind == TEXT:
        return fields.text()
    if kind in NUMBERS:
        return fields.number(NUMBERS[kind])
    if kind != ARRAY:
        raise fields.damaged(f"a value of the unknown type {kind}")
    kind = fields.number("I")
    if kind == TEXT:
        count = fields.counted("texts of an array", least=8)
        for _ in range(count):
            fields.skip(fields.number("Q"))
        return Array(count)
    if kind not in NUMBERS:
        raise fields.damaged(f"an array of values of the type {kind}")
    size = struct.calcsize(f"<{NUMBERS[kind]}")
    count = fields.counted("numbers of an array", least=size)
    begin = fields.skip(count * size)
    if count > MAX_KEPT:
        return Array(count)
    return Array(count, struct.unpack_from(f"<{count}{NUMBERS[kind]}", fields.data, begin))


def _info(fields: _Fields) -> _Info:
    name = fields.text()
    check_name(fields.path, name)
    dimensions = fields.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise fields.damaged(f"tensor {name!r} has {dimensions:,} dimensions; {MAX_DIMENSIONS} is the most")
    shape = tuple(fields.number("Q") for _ in range(dimensions))[::-1]
    if math.prod(size or 1 for size in shape) > MAX_BYTES:
        raise fields.damaged(f"tensor {name!r} has a shape of more elements than any file: {shape}")
    return _Info(name, shape, fields.number("I"), fields.number("Q"))


def _spec(fields: _Fields, library: Any, info: _Info, offset: int) -> TensorSpec:
    """Return a tensor that lies at a byte of the file, once its type is known and its rows are whole blocks."""
    try:
        kind = library.GGMLQuantizationType(info.type)
        elements, nbytes = library.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{fields.path}: tensor {info.name!r} is of type {info.type}, which the installed gguf package doesn't "
            "know: pip install -U gguf, or download another quantisation."
        ) from None
    if kind.name in PLAIN_TYPES:
        return TensorSpec(info.name, PLAIN_TYPES[kind.name], info.shape, fields.path, offset)
    if not _can_be_dequantised(kind.name, nbytes):
        raise CheckpointError(
            f"{fields.path}: tensor {info.name!r} is in {kind.name}, which the installed gguf package doesn't "
            "dequantise. Download another quantisation."
        )
    if not info.shape or info.shape[-1] % elements:
        raise fields.damaged(f"tensor {info.name!r} has rows of {info.shape[-1:]}, no whole blocks of {elements}")
    encoding = GgmlBlocks(kind.name, elements, nbytes)
    return TensorSpec(info.name, "float32", info.shape, fields.path, offset, encoding, written_as="bfloat16")


@lru_cache
def _can_be_dequantised(kind: str, nbytes: int) -> bool:
    """Return whether the package dequantises a format: it is given a block of ``nbytes`` zeros."""
    library = gguf_library()
    try:
        library.dequantize(np.zeros((1, nbytes), dtype=np.uint8), library.GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
