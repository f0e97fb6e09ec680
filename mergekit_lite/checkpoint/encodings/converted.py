"""Tensors that other programs store in another form than transformers.

llama.cpp's converter says what it does class by class, in its folder ``conversion``.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.derived import Derived
from mergekit_lite.checkpoint.encodings.pieces import by_rows, pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class InterleavedHeads(Derived):
    """Rows of queries or keys whose rotary pairs lie side by side, shown as transformers has them: in two halves.

    Of a head of 2n rows, row i and row n + i are a pair for transformers (``rotate_half``); stored are they as rows 2i
    and 2i + 1, as Meta's own files of Llama have them. A bias counts as a matrix of one column.
    """

    heads: int

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Gather the rows: those of half a head are every other one of the stored rows."""
        columns = spec.numel // spec.shape[0]
        for begin, piece in pieces(start, out, spec.dtype):
            for row, column, part in by_rows(begin, piece, columns):
                self._fill_rows(spec.shape[0], columns, reader, row, column, part)

    @property
    def key(self) -> tuple[object, ...]:
        """The stored tensor, and the number of heads."""
        return type(self).__name__, self.stored.key, self.heads

    def _fill_rows(self, rows: int, columns: int, reader: Reader, row: int, column: int, out: torch.Tensor) -> None:
        """Fill ``out`` (rows, columns), which begins at ``row`` and ``column`` of the tensor."""
        half = rows // self.heads // 2
        done = 0
        while done < len(out):
            in_pair, pair = divmod((row + done) % (2 * half), half)
            first = (row + done) // (2 * half) * 2 * half + 2 * pair + in_pair
            count = min(half - pair, len(out) - done)  # to the end of this half of the head
            if out.shape[1] < columns:
                stored = self.stored.elements(reader, first * columns + column, out.shape[1])
                out[done].copy_(stored)
            else:
                stored = self.stored.elements(reader, first * columns, (2 * count - 1) * columns)
                out[done : done + count].copy_(stored.view(-1, columns)[::2])
            done += count


@dataclass(frozen=True, slots=True)
class PlusOne(Derived):
    """A norm's weights that are stored with the one that the model adds to them when it runs, as Gemma's are."""

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Take the one away."""
        for begin, piece in pieces(start, out, spec.dtype):
            piece.copy_(self.stored.elements(reader, begin, piece.numel())).sub_(1)
