"""Low-rank factors of a stack of matrices: a LoRA on the experts of a layer that are one tensor."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.low_rank import LowRank
from mergekit_lite.checkpoint.encodings.strided import Strided, viewed
from mergekit_lite.checkpoint.encodings.sum import Term
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class StackedLowRank(Term):
    """``left[e] · right[e]`` for each matrix e of a stack."""

    left: TensorSpec  # (matrices, rows, rank), a strided view of what is stored
    right: TensorSpec  # (matrices, rank, columns), likewise

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the products of the matrices that ``total`` touches."""
        size = shape[-2] * shape[-1]
        done = 0
        while done < len(total):
            number, within = divmod(start + done, size)
            count = min(size - within, len(total) - done)
            product = LowRank(matrix_of(self.left, number), matrix_of(self.right, number), scale=self.scale)
            product.add(reader, shape[-2:], within, total[done : done + count])
            done += count


def matrix_of(stack: TensorSpec, number: int) -> TensorSpec:
    """Return one matrix of a strided stack."""
    assert isinstance(stack.encoding, Strided)
    distance, *strides = stack.encoding.strides
    return viewed(stack, number * distance, stack.shape[1:], tuple(strides))
