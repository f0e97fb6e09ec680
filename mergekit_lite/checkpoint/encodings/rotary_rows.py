"""Rows of a query or key projection in another order: pairs of a rotary embedding side by side, or half a head apart.

Meta's Llama, and torchtitan after it, rotate rows ``2i`` and ``2i + 1`` of each head together; transformers rows ``i``
and ``i + head / 2``. So the rows of its weights are those of the other in this order, see ``permute`` in transformers'
``convert_llama_weights_to_hf.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Encoding, TensorSpec


@dataclass(frozen=True, slots=True)
class HalvesOfHeads(Encoding):
    """A matrix whose rows were stored in pairs, with the two halves of each head one after the other."""

    pairs: TensorSpec  # as stored
    head: int  # rows of a head, an even number

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read each row, or a part of it, from its place among the pairs."""
        columns, size = spec.shape[1], dtypes.size(spec.dtype)
        done, total = 0, len(out) // size
        while done < total:
            row, column = divmod(start + done, columns)
            count = min(columns - column, total - done)
            within = row % self.head
            half, pair = divmod(within, self.head // 2)
            stored = row - within + 2 * pair + half
            self.pairs.fill(reader, stored * columns + column, out[done * size : (done + count) * size])
            done += count

    @property
    def key(self) -> tuple[object, ...]:
        """The stored matrix and the rows of a head."""
        return self.pairs.key, self.head
