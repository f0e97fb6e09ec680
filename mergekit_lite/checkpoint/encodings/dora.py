"""A LoRA whose rows have lengths of their own (DoRA, Liu et al., arXiv 2402.09353).

    row = magnitude · (W + scale · left · right) / ‖W + scale · left · right‖

A row's length is that of the whole row, so rows that are read in part are computed whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.low_rank import LowRank
from mergekit_lite.checkpoint.encodings.sum import Term
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch

TOGETHER = 1 << 20  # elements of whole rows that are computed at once


@dataclass(frozen=True, slots=True)
class Dora(Term):
    """What a DoRA changes in its base: ``row − origin``, in float64."""

    origin: TensorSpec  # (rows, columns)
    left: TensorSpec  # (rows, rank)
    right: TensorSpec  # (rank, columns)
    magnitude: TensorSpec  # (rows)
    inner: float  # the scale of the product of the factors

    @property
    def key(self) -> tuple[object, ...]:
        """That of any term, and the inner scale."""
        return *super(Dora, self).key, self.inner

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the differences."""
        columns = shape[-1]
        height = max(1, TOGETHER // columns)
        first, last = start // columns, -(-(start + len(total)) // columns)
        for top in range(first, last, height):
            count = min(height, last - top)
            origin = self.origin.elements(reader, top * columns, count * columns).double()
            changed = origin.clone()
            LowRank(self.left, self.right, scale=self.inner).add(reader, shape, top * columns, changed)
            rows = changed.view(count, columns)
            magnitude = self.magnitude.elements(reader, top, count).double()
            rows.mul_((magnitude / _lengths(rows)).view(-1, 1))
            # Of these rows, the elements that ``total`` has.
            begin, end = max(start, top * columns), min(start + len(total), (top + count) * columns)
            wanted = slice(begin - top * columns, end - top * columns)
            part = total[begin - start : end - start]
            part.sub_(origin[wanted].mul_(self.scale)).add_(changed[wanted].mul_(self.scale))


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    """Return the length of each row. Squares are summed by halves: a library's order may depend on the number of rows.

    The halves are those of the next power of two, so that no row is copied: what lies beyond its end counts as zero.
    """
    squares = rows.square()
    while (width := squares.shape[1]) > 1:
        half = 1 << (width - 1).bit_length() - 1
        squares[:, : width - half] += squares[:, half:]
        squares = squares[:, :half]
    return squares.view(-1).sqrt()
