"""Experts in MXFP4 as gpt-oss stores them: blocks of 32 four-bit floats with a power of two, the matrices transposed.

What transformers' ``convert_moe_packed_tensors`` gives, bit for bit: every value is exact in bfloat16
(OCP Microscaling Formats, 2023). A stored row is a column of what it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mergekit_lite.checkpoint.encodings.bits import looked_up
from mergekit_lite.checkpoint.encodings.lookup import pairs
from mergekit_lite.checkpoint.encodings.pieces import by_rows, pieces
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
    scheme: str = "MXFP4"

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Fill rows of the experts from strips of their stored columns."""
        _, rows, columns = spec.shape
        for begin, piece in pieces(start, out, spec.dtype):
            for row, column, part in by_rows(begin, piece, columns):
                done = 0
                while done < len(part):  # rows are counted through all experts
                    expert, top = divmod(row + done, rows)
                    height = min(rows - top, len(part) - done)
                    self._fill_expert(spec, reader, expert, top, column, part[done : done + height])
                    done += height

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

    def _fill_expert(
        self, spec: TensorSpec, reader: Reader, expert: int, row: int, column: int, out: torch.Tensor
    ) -> None:
        """Fill ``out`` (rows, columns), which begins at ``row`` and ``column`` of an expert."""
        rows, columns = spec.shape[1:]
        first, last = row // SIZE, -(-(row + len(out)) // SIZE)  # blocks
        table, powers = pairs("e2m1", spec.dtype), _powers(spec.dtype)
        height = max(1, STRIP // (rows // 2))
        for begin in range(column, column + out.shape[1], height):
            count = min(height, column + out.shape[1] - begin)
            stored = (expert * columns + begin) * rows // SIZE  # blocks before the strip
            blocks = count * rows // SIZE
            codes = self.codes.elements(reader, stored * SIZE // 2, blocks * SIZE // 2).view(count, -1, SIZE // 2)
            exponents = self.exponents.elements(reader, stored, blocks).view(count, -1)[:, first:last]
            values = looked_up(table, codes[:, first:last]).view(count, last - first, SIZE)
            values.mul_(powers[exponents.to(torch.int32)][..., None])
            wanted = values.view(count, -1)[:, row - first * SIZE :][:, : len(out)]
            out[:, begin - column :][:, :count].copy_(wanted.T)


@lru_cache
def _powers(dtype: str) -> torch.Tensor:
    """Return the power of two that each exponent stands for: (256), of the dtype; the last one is infinite."""
    exponents = torch.arange(256) - BIAS
    return torch.ldexp(torch.ones(256, dtype=torch.float64), exponents).to(getattr(torch, dtype))
