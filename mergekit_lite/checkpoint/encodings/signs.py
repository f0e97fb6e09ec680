"""A difference of which only the signs are stored, and a size for each row.

BitDelta (Liu et al., arXiv 2402.10193) has one size for each matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.pieces import by_rows
from mergekit_lite.checkpoint.encodings.sum import Expected, VectorTerm
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import np, torch


@dataclass(frozen=True, slots=True)
class Signs(VectorTerm):
    """``± size``."""

    bits: TensorSpec  # (⌈elements / 8⌉), uint8: one for each element, the lowest of a byte first, set where positive
    sizes: TensorSpec  # (rows), floats

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add each row's size, positive or negative."""
        skipped = start % 8  # bits of the first byte that belong to elements before
        packed = self.bits.elements(reader, start // 8, -(-(skipped + len(total)) // 8))
        positive = np.unpackbits(packed.numpy(), bitorder="little")[skipped : skipped + len(total)]
        signs = torch.from_numpy(positive).double().mul_(2).sub_(1)
        columns = shape[-1] if shape else 1
        for row, column, part in by_rows(start, total, columns):
            sizes = self.sizes.elements(reader, row, len(part)).double().mul_(self.scale)
            begin = row * columns + column - start
            part += signs[begin : begin + part.numel()].view(part.shape).mul_(sizes[:, None])

    def expected(self, name: str, shape: tuple[int, ...]) -> Expected:
        """Return the number of bytes that hold the bits, and the number of rows."""
        numel, rows = math.prod(shape), math.prod(shape[:-1])
        return {self.bits: ((-(-numel // 8),), ("uint8",)), self.sizes: ((rows,), dtypes.FLOATS)}
