"""Codes that stand for the values of a table: 4-bit floats, and bytes with a table that is stored with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.bits import looked_up
from mergekit_lite.checkpoint.encodings.pieces import pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Encoding, TensorSpec
from mergekit_lite.deferred import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # two bits of exponent, one of fraction (OCP Microscaling, 2023)
TABLES = {
    "e2m1": (*E2M1, *(-value for value in E2M1)),
    "e2m1, one zero": (*E2M1, 0.0, *(-value for value in E2M1[1:])),  # NVIDIA's ModelOpt has no −0
    # Quantiles of a normal distribution (Dettmers et al., arXiv 2305.14314), as bitsandbytes spells them.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # bitsandbytes' kernels have a −0; what it falls back to for odd numbers of columns has none.
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Nibbles(Encoding):
    """Two codes in a byte, each of a table of 16 values; the elements follow one another through all rows."""

    codes: TensorSpec  # its bytes are read as they lie, whatever dtype they were saved as
    table: str  # of TABLES
    first_is_high: bool = False  # whether the first of two elements is in the byte's upper half

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Look up the values of both codes of each byte."""
        table = pairs(self.table, spec.dtype, self.first_is_high)
        for begin, piece in pieces(start, out, spec.dtype):
            first, last = begin // 2, -(-(begin + piece.numel()) // 2)
            stored = torch.empty(last - first, dtype=torch.uint8)
            reader.fill(self.codes.file, self.codes.offset + first, stored.numpy().data, self.codes.name)
            piece.copy_(looked_up(table, stored)[begin - 2 * first :][: piece.numel()])

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype that the bytes were saved as."""
        return self.codes.dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return half a byte an element."""
        return -(-count // 2)

    @property
    def key(self) -> tuple[object, ...]:
        """The codes, the table, and which half of a byte is first."""
        return self.codes.key, self.table, self.first_is_high


@dataclass(frozen=True, slots=True)
class Lookup(Encoding):
    """A byte an element, which is the number of a value in a stored table."""

    codes: TensorSpec  # uint8, of the same shape
    table: TensorSpec  # (256), of the values' dtype

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Look up each byte's value."""
        table = reader.remembered(self.table, lambda: self.table.elements(reader, 0, self.table.numel))
        for begin, piece in pieces(start, out, spec.dtype):
            stored = self.codes.elements(reader, begin, piece.numel())
            piece.copy_(table[stored.to(torch.int32)])

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype of the codes."""
        return self.codes.dtype

    @property
    def key(self) -> tuple[object, ...]:
        """The codes and the table."""
        return self.codes.key, self.table.key


@lru_cache
def pairs(table: str, dtype: str, first_is_high: bool = False) -> torch.Tensor:
    """Return the two values that each byte stands for: (256, 2), of the dtype."""
    values = torch.tensor(TABLES[table], dtype=dtypes.torch_dtype(dtype))
    byte = torch.arange(256)
    halves = (byte >> 4, byte & 15) if first_is_high else (byte & 15, byte >> 4)
    return torch.stack([values[half] for half in halves], 1)
