"""The difference of two stored tensors: what a tensor that an adapter replaces adds where it counts in part only."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.sum import Term
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class Replace(Term):
    """``target − origin``."""

    target: TensorSpec
    origin: TensorSpec

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Both tensors."""
        return self.target, self.origin

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the difference, computed in float64."""
        target = self.target.elements(reader, start, len(total)).double()
        total += target.sub_(self.origin.elements(reader, start, len(total)).double()).mul_(self.scale)
