"""Differences with a value for every element: a stored one, and that of two stored tensors."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.sum import Expected, Term, VectorTerm
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class Dense(VectorTerm):
    """A stored value for every element."""

    values: TensorSpec

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the values."""
        total += self.values.elements(reader, start, len(total)).double().mul_(self.scale)

    def expected(self, name: str, shape: tuple[int, ...]) -> Expected:
        """Return the tensor's shape and the float dtypes."""
        return {self.values: (shape, dtypes.FLOATS)}


@dataclass(frozen=True, slots=True)
class Replace(Term):
    """``target − origin``, in float64: what a tensor that an adapter replaces adds where it counts in part only."""

    target: TensorSpec
    origin: TensorSpec

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the difference."""
        target = self.target.elements(reader, start, len(total)).double()
        total += target.sub_(self.origin.elements(reader, start, len(total)).double()).mul_(self.scale)
