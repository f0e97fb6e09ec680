"""By singular vectors: full decompositions by numpy, in float64, of matrices without singular values of zero.

Of a tensor that is a linear layer's weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.methods.reference.table import Tensor, reference

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def mean(base: Tensor, models: list[Tensor], scale: float = 1.0) -> Tensor:
    return base + scale * sum(x - base for x in models) / len(models)


def deltas(base: Tensor, models: list[Tensor], matrices: str) -> list[Matrix]:
    """None where the mean is taken."""
    if base.dim() != 2 or matrices == "none":
        return []
    return [(x - base).numpy() for x in models]


def svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    return np.linalg.svd(matrix, full_matrices=False)


def polar(matrix: Matrix) -> Matrix:
    p, _, q = svd(matrix)
    return p @ q


@reference
def iso_c(base: Tensor, models: list[Tensor], *, matrices: str = "linear", **scale: float) -> Tensor:
    ds = deltas(base, models, matrices)
    if not ds:
        return mean(base, models, scale.get("lambda", 1.0))
    u, s, v = svd(sum(ds))
    return base + scale.get("lambda", 1.0) * torch.from_numpy(u * s.mean() @ v)
