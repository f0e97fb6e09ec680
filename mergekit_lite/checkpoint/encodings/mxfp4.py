"""Experts in MXFP4 as gpt-oss stores them: blocks of 32 four-bit floats with a power of two, the matrices transposed.

What transformers' ``convert_moe_packed_tensors`` gives, bit for bit: every value is exact in bfloat16
(OCP Microscaling Formats, 2023). A stored row is a column of what it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mergekit_lite.checkpoint.encodings.bits import looked_up
from mergekit_lite.checkpoint.encodings.lookup import pairs
from mergekit_lite.checkpoint.encodings.pieces import pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.deferred import torch

SIZE = 32  # elements of a block
BIAS = 127  # of the exponents
STRIP = 1 << 20  # bytes of codes that are read at once


@dataclass(frozen=True, slots=True)
class TransposedMXFP4(Encoding):
    """Codes by column, and an exponent for each block of them; the values are bfloat16."""

    codes: TensorSpec  # (experts, columns, rows / 32, 16), uint8
    exponents: TensorSpec  # (experts, columns, rows / 32), uint8
    scheme: str | None = "MXFP4"

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Fill the rows that the elements are in, expert by expert."""
        _, rows, columns = spec.shape
        for begin, piece in pieces(start, out, spec.dtype):
            done = 0
            while done < piece.numel():
                expert, first = divmod(begin + done, rows * columns)
                count = min(piece.numel() - done, rows * columns - first)
                self._fill_part(spec, reader, expert, first, piece[done : done + count])
                done += count

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype of the bytes."""
        return self.codes.dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return half a byte an element."""
        return -(-count // 2)

    @property
    def block(self) -> Block:
        """The elements of a column that share an exponent."""
        return SIZE, 1

    @property
    def key(self) -> tuple[object, ...]:
        """The codes and the exponents."""
        return self.codes.key, self.exponents.key

    def _fill_part(self, spec: TensorSpec, reader: Reader, expert: int, start: int, out: torch.Tensor) -> None:
        """Fill ``out``, 1-D, with the elements from ``start`` on of an expert.

        They lie in a few of its rows. Of these, strips of columns are read, whose stored rows follow one another.
        """
        _, rows, columns = spec.shape
        (top, left), (bottom, right) = divmod(start, columns), divmod(start + len(out) - 1, columns)
        if top != bottom:
            left, right = 0, columns - 1
        touched = torch.empty(bottom + 1 - top, right + 1 - left, dtype=out.dtype)
        first, last = top // SIZE, bottom // SIZE + 1  # blocks of a stored row
        table, powers = pairs("e2m1", spec.dtype), _powers(spec.dtype)
        width = max(1, STRIP // (rows // 2))
        for begin in range(left, right + 1, width):
            count = min(width, right + 1 - begin)
            stored, blocks = (expert * columns + begin) * rows // SIZE, count * rows // SIZE
            codes = self.codes.elements(reader, stored * SIZE // 2, blocks * SIZE // 2).view(count, -1, SIZE // 2)
            exponents = self.exponents.elements(reader, stored, blocks).view(count, -1)[:, first:last]
            values = looked_up(table, codes[:, first:last]).view(count, last - first, SIZE)
            values.mul_(powers[exponents.to(torch.int32)][..., None])
            wanted = values.view(count, -1)[:, top - first * SIZE :][:, : len(touched)]
            touched[:, begin - left :][:, :count] = wanted.T
        out.copy_(touched.view(-1)[start - top * columns - left :][: len(out)])


@lru_cache
def _powers(dtype: str) -> torch.Tensor:
    """Return the power of two that each exponent stands for: (256), of the dtype; the last one is infinite."""
    exponents = torch.arange(256) - BIAS
    return torch.ldexp(torch.ones(256, dtype=torch.float64), exponents).to(getattr(torch, dtype))
