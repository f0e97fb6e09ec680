"""Operations on blocks of weights: what methods name (``operations``), and the backends that do it.

Each backend is one file. ``ops_for`` chooses one for a tensor; what the C library lacks torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_lite import dtypes
from mergekit_lite.ops import c_ops
from mergekit_lite.ops.operations import NOTHING, AllFinite, Merge, Observed, Statistic, TensorKind
from mergekit_lite.ops.torch_ops import TorchOps

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["CPU", "Ops", "TensorKind", "all_finite", "finite_needs_torch", "ops_for"]

CPU = "cpu"


class Ops(Protocol):
    """A backend. What it works on are views of elements: ``view[a:b]`` are some of them."""

    needs_torch: bool

    def of_bytes(self, chunk: memoryview, dtype: str) -> Any:
        """Return a view of the elements that some bytes in the memory of the CPU are; at least one."""

    def of_tensor(self, tensor: torch.Tensor) -> Any:
        """Return a view of a 1-D contiguous tensor."""

    def merge(
        self, operation: Merge, block: Sequence[Any], start: int, out: Any, length: int, observed: Observed = NOTHING
    ) -> list[list[float]]:
        """Merge a block into ``out``, a view of as many elements, rounded to its dtype.

        ``block`` has views of the inputs, as they are stored, the base's first; ``start`` is the index of the first
        element. ``length`` elements are computed at once, where the backend has temporaries.

        Returns the figures of each grain that is ``observed``: of what was merged, followed by the inputs. None of the
        grains may lie in two of those lengths.
        """

    def at_hand(self, block: Sequence[Any]) -> Sequence[Any]:
        """Return a block where it is computed on: what several calls need moves there once."""

    def sum(self, operation: Statistic, block: Sequence[Any], start: int, length: int) -> npt.NDArray[Any]:
        """Return the figures over a block, added up over parts of ``length`` elements. Arguments as of ``merge``."""

    def figures(self, operation: Statistic, block: Sequence[Any]) -> list[float]:
        """Return the figures of one block."""


def ops_for(operation: Merge | Statistic, kind: TensorKind, device: str = CPU) -> Ops:
    """Choose the backend that does an operation to a tensor."""
    return c_ops.C_OPS if device == CPU and c_ops.does(operation, kind) else TorchOps(kind, device)


def all_finite(chunk: memoryview, dtype: str) -> bool:
    """Return whether a chunk in the memory of the CPU holds neither NaN nor infinity."""
    if not dtypes.is_float(dtype):
        return True
    ops = ops_for(AllFinite(), TensorKind((dtype,)))
    return ops.figures(AllFinite(), [ops.of_bytes(chunk, dtype)]) == [1]


def finite_needs_torch(dtype: str) -> bool:
    """Return whether ``all_finite`` needs torch for this dtype."""
    return dtypes.is_float(dtype) and ops_for(AllFinite(), TensorKind((dtype,))).needs_torch
