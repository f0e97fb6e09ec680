"""Rows of a matrix that an adapter replaces: those of single tokens, trained apart."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.sum import Term
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class Rows(Term):
    """``target − origin`` in some rows, in float64; nothing in the others."""

    target: TensorSpec  # (rows, columns): what stands in those rows
    origin: TensorSpec  # the whole matrix
    rows: tuple[int, ...]  # for each row of ``target`` its number in ``origin``

    @property
    def key(self) -> tuple[object, ...]:
        """That of any term, and the rows."""
        return *super(Rows, self).key, self.rows

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the differences of the rows that ``total`` touches."""
        columns = shape[-1]
        for number, row in enumerate(self.rows):
            first, last = max(start, row * columns), min(start + len(total), (row + 1) * columns)
            if first >= last:
                continue
            origin, target = (
                spec.elements(reader, at, last - first).double().mul_(self.scale)
                for spec, at in ((self.origin, first), (self.target, first + (number - row) * columns))
            )
            total[first - start : last - start].sub_(origin).add_(target)  # in this order: a whole difference is exact
