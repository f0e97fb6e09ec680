"""A difference with a value for every element."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.sum import Expected, VectorTerm
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class Dense(VectorTerm):
    """A value for every element."""

    values: TensorSpec

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The values."""
        return (self.values,)

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the values."""
        total += self.values.elements(reader, start, len(total)).double().mul_(self.scale)

    def expected(self, name: str, shape: tuple[int, ...]) -> Expected:
        """Return the tensor's shape and the float dtypes."""
        return {self.values: (shape, dtypes.FLOATS)}
