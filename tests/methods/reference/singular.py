"""By singular vectors: full decompositions by numpy, in float64, of matrices without singular values of zero.

Of a tensor that is a linear layer's weight.
"""

from __future__ import annotations

import math
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


def decorrelated(parts: list[tuple[Matrix, Matrix, Matrix]]) -> tuple[Matrix, Matrix, Matrix]:
    u, s, v = (list(kind) for kind in zip(*parts, strict=True))
    return polar(np.hstack(u)), np.hstack(s), polar(np.vstack(v))


def top(matrix: Matrix, count: int) -> tuple[Matrix, Matrix, Matrix]:
    u, s, v = svd(matrix)
    return u[:, :count], s[:count], v[:count]


@reference
def tsv(
    base: Tensor, models: list[Tensor], *, lossless: bool = False, matrices: str = "linear", **scale: float
) -> Tensor:
    ds = deltas(base, models, matrices)
    if not ds:
        return mean(base, models, scale.get("lambda", 1.0))
    rank = min(base.shape)
    u, s, v = decorrelated([top(d, rank if lossless else int(rank / len(ds))) for d in ds])
    return base + scale.get("lambda", 1.0) * torch.from_numpy(u @ np.diag(s) @ v)


@reference
def iso_cts(
    base: Tensor,
    models: list[Tensor],
    *,
    common_space_fraction: float = 0.8,
    matrices: str = "linear",
    **scale: float,
) -> Tensor:
    ds = deltas(base, models, matrices)
    if not ds:
        return mean(base, models, scale.get("lambda", 1.0))
    rank = min(base.shape)
    own = round((rank - int(rank * common_space_fraction)) / len(ds))
    while own * len(ds) > rank:
        own -= 1
    common = top(sum(ds), rank - own * len(ds))
    u, s, v = decorrelated([*(top(d - common[0] @ common[0].T @ d, own) for d in ds), common])
    return base + scale.get("lambda", 1.0) * torch.from_numpy(u @ v * s.mean())


@reference
def cart(base: Tensor, models: list[Tensor], *, p: float = 0.04, matrices: str = "linear", **scale: float) -> Tensor:
    ds = deltas(base, models, matrices)
    if not ds:
        return mean(base, models)
    centre = sum(ds) / len(ds)
    out = centre.copy()
    for d in ds:
        u, s, v = top(d - centre, math.ceil(p * min(base.shape)))
        out += scale.get("lambda", 1.0) * (u * s) @ v
    return base + torch.from_numpy(out)


@reference
def wudi(base: Tensor, models: list[Tensor], *, steps: Any = "exact", matrices: str = "linear") -> Tensor:
    """As least squares over the rows of all deltas, or with Adam by torch."""
    ds = deltas(base, models, matrices)
    if not ds:
        return mean(base, models)
    start = sum(ds)
    if steps == "exact":
        directions = np.vstack([d / np.linalg.norm(d) for d in ds])
        wanted = np.vstack([(d @ (d - start).T) / np.linalg.norm(d) for d in ds])
        return base + torch.from_numpy(start + np.linalg.lstsq(directions, wanted, rcond=None)[0].T)
    change = torch.from_numpy(start).requires_grad_()
    adam = torch.optim.Adam([change], lr=1e-5)
    for _ in range(steps):
        adam.zero_grad()
        loss = sum(((change - d) @ d.T).square().sum() / d.square().sum() for d in map(torch.from_numpy, ds))
        loss.backward()
        adam.step()
    return base + change.detach()
