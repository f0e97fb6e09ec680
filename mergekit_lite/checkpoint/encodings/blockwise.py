"""Values between −1 and 1 in blocks of one largest magnitude, counted through all rows, as bitsandbytes has them.

value = ``round(table value · absmax)``, the product in float32. The magnitudes of NF4 may be quantised once more by
the same rule: then a mean is added to them (Dettmers et al., arXiv 2305.14314, "double quantization").
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.pieces import by_rows, pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec

CACHED = 1 << 18  # elements at a time: the values in float32 stay in the cache, which is twice as fast


@dataclass(frozen=True, slots=True)
class Blockwise(Encoding):
    """Values that are multiplied by the magnitude of their block."""

    values: TensorSpec  # of the same shape, float32
    absmax: TensorSpec  # (⌈elements / size⌉), float32
    size: int  # elements of a block
    mean: float = 0.0  # added to each product
    scheme: str | None = None

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Multiply by the magnitudes, and round."""
        for begin, piece in pieces(start, out, spec.dtype, CACHED):
            values = self.values.elements(reader, begin, piece.numel())
            first, last = begin // self.size, -(-(begin + piece.numel()) // self.size)
            absmax = self.absmax.elements(reader, first, last - first)
            for block, _, part in by_rows(begin, values, self.size):
                part.mul_(absmax[block - first : block - first + len(part), None])
            piece.copy_(values.add_(self.mean) if self.mean else values)

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype of the codes."""
        return self.values.stored_dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes of the codes."""
        return self.values.stored_bytes(count)

    @property
    def block(self) -> Block:
        """The elements that share a magnitude, as a block of one row."""
        return 1, self.size

    @property
    def key(self) -> tuple[object, ...]:
        """The values, the magnitudes, the size of a block, and the mean."""
        return self.values.key, self.absmax.key, self.size, self.mean
