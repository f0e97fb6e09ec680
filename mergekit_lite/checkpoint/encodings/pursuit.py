"""Vectors as sums of few others: orthogonal matching pursuit, and nearest neighbours.

The sums are used in another space: what rebuilds a token's row from those of other tokens in one model rebuilds it from
theirs in another (Goddard et al., arXiv 2506.06607). mergekit's tokensurgeon computes in float32; here everything that
decides is float64, so that machines agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

SPARSE = 64  # vectors in a sum, by default
NEAREST = 1e-6  # distances below count as this
DEPENDENT = 1e-10  # share of a vector that isn't in the span of others, below which it is rounding alone
PAIRS = 1 << 21  # elements of vectors that are compared exactly at once
MANY = 1 << 23  # elements of vectors that are widened at once


class Combination(NamedTuple):
    """For each target the numbers of vectors (int64), and what they are multiplied with (float64): both (B, k)."""

    chosen: torch.Tensor
    coefficients: torch.Tensor


class Atoms:
    """Vectors (N, D), in the dtype that they are stored in, with what finding the best of them takes.

    On processors that multiply matrices in bfloat16 (AMX) the search runs in that, elsewhere in float32. What it finds
    is the same: it gives every vector that may be the best, by bounds of its rounding errors, and those are compared in
    float64.
    """

    def __init__(self, vectors: torch.Tensor, fast: bool | None = None) -> None:
        self.vectors = vectors
        self.fast = has_fast_bfloat16() if fast is None else fast
        self._step = max(1, MANY // max(1, vectors.shape[1]))
        self.norms = torch.cat([part.double().norm(dim=1) for part in self.parts()])
        self._searched = vectors.bfloat16() if self.fast else vectors
        rounded = [(part.double() - part.bfloat16().double()).norm(dim=1) for part in self.parts()] if self.fast else []
        self._rounded = torch.cat(rounded) if self.fast else torch.zeros_like(self.norms)  # lengths of rounding errors

    def parts(self) -> Iterator[torch.Tensor]:
        """Yield the vectors, as many at once as may be widened."""
        for begin in range(0, len(self.vectors), self._step):
            yield self.vectors[begin : begin + self._step]

    def products(self, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sizes of the products of directions (B, D) of length 1 at most with all vectors, from below.

        And from above: both are (B, N), float32. Between them lies what float64 gives: they are apart by the lengths of
        the rounding errors of both factors, which are known, by that of the result, and by what adding up may add.
        """
        kind = torch.bfloat16 if self.fast else torch.float32
        rounded = directions.to(kind)
        if self.fast:
            sizes = (rounded @ self._searched.T).float().abs_()
        else:
            sizes = torch.cat([rounded @ part.float().T for part in self.parts()], 1).abs_()
        most = (directions - rounded.double()).norm(dim=1).max().nan_to_num()
        errors = ((most + 2 * directions.shape[1] * 2.0**-24) * self.norms + 1.01 * self._rounded).float()
        of_result = 2.0**-9 if self.fast else 2.0**-23
        return sizes.mul(1 - 2 * of_result).sub_(errors), sizes.mul_(1 + 2 * of_result).add_(errors)

    def best(self, residual: torch.Tensor, taken: torch.Tensor, least_length: torch.Tensor) -> torch.Tensor:
        """Return for each residual (B, D) the vector of the largest product, the first of equal ones: (B,).

        ``taken`` (B, t) are those that are not to be chosen again. Residuals that are no longer than ``least_length``
        (B,), or not finite, get the first of all: it will count nothing.
        """
        lengths = residual.norm(dim=1, keepdim=True)
        is_left = lengths > least_length[:, None]
        least, most = self.products(torch.where(is_left, residual / lengths, 0.0))
        for sizes in (least, most):
            sizes.scatter_(1, taken, -torch.inf)
        bound = torch.where(is_left, least.amax(1, keepdim=True), torch.inf)
        rows, numbers = (most >= bound).nonzero(as_tuple=True)
        exact = torch.empty(len(rows), dtype=torch.float64)
        step = max(1, PAIRS // residual.shape[1])
        for begin in range(0, len(rows), step):
            some = slice(begin, begin + step)
            exact[some] = (self.vectors[numbers[some]].double() * residual[rows[some]]).sum(1).abs()
        largest = torch.full((len(residual),), -1.0, dtype=torch.float64).scatter_reduce_(0, rows, exact, "amax")
        is_best = exact == largest[rows]
        none = len(self.vectors)
        first = torch.full((len(residual),), none, dtype=torch.int64)
        first.scatter_reduce_(0, rows[is_best], numbers[is_best], "amin")
        return torch.where(first == none, 0, first)


def has_fast_bfloat16() -> bool:
    """Return whether this processor multiplies matrices of bfloat16 faster than of float32."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(asked is not None and asked())


def pursued(targets: torch.Tensor, atoms: Atoms, k: int) -> Combination:
    """Return orthogonal matching pursuit: ``k`` times the vector with the largest product with what is left.

    After each the sum is the best of those chosen so far, in least squares. Vectors are not normalised: long ones are
    preferred, as in the paper's code. Where nothing is left to explain, coefficients are 0.

    Args:
        targets: (B, D), float64.
        atoms: the vectors; at least ``k``.
        k: how many of them a sum has.
    """
    count, width = targets.shape
    basis = torch.zeros(count, k, width, dtype=torch.float64)
    triangle = torch.eye(k, dtype=torch.float64).repeat(count, 1, 1)
    along = torch.zeros(count, k, dtype=torch.float64)
    chosen = torch.zeros(count, k, dtype=torch.int64)
    residual = targets.clone()
    least_length = DEPENDENT * targets.norm(dim=1)
    for step in range(k):
        number = atoms.best(residual, chosen[:, :step], least_length)
        chosen[:, step] = number
        vector = atoms.vectors[number].double()
        before = basis[:, :step]
        parts = torch.bmm(before, vector[:, :, None])
        rest = torch.baddbmm(vector[:, None], parts.transpose(1, 2), before, alpha=-1)[:, 0]
        length = rest.norm(dim=1)
        is_new = length > DEPENDENT * atoms.norms[number]
        unit = torch.where(is_new[:, None], rest / length.clamp_min(torch.finfo(torch.float64).tiny)[:, None], 0.0)
        triangle[:, :step, step] = torch.where(is_new[:, None], parts[:, :, 0], 0.0)
        triangle[:, step, step] = torch.where(is_new, length, 1.0)
        basis[:, step] = unit
        along[:, step] = (unit * residual).sum(1)
        residual.addcmul_(unit, along[:, step, None], value=-1)
    coefficients = torch.linalg.solve_triangular(triangle, along[:, :, None], upper=True)[:, :, 0]
    return Combination(chosen, coefficients)


def nearest(targets: torch.Tensor, atoms: Atoms, k: int) -> Combination:
    """Return the ``k`` nearest vectors by Euclid's distance, weighted by its inverse: weights sum to 1.

    ``targets`` are (B, D), float64. Equal to mergekit's common_interpolation.
    """
    squares = [
        (part @ targets.T).mul_(-2).add_(part.square().sum(1, keepdim=True))
        for part in map(torch.Tensor.double, atoms.parts())
    ]
    squared = torch.cat(squares).T + targets.square().sum(1, keepdim=True)
    chosen = squared.topk(k, dim=1, largest=False).indices
    distances = torch.stack(
        [
            (atoms.vectors[numbers].double() - target).norm(dim=1)
            for numbers, target in zip(chosen, targets, strict=True)
        ]
    ).clamp_min(NEAREST)
    order = distances.argsort(dim=1, stable=True)
    chosen, inverse = chosen.gather(1, order), 1 / distances.gather(1, order)
    return Combination(chosen, inverse / inverse.sum(1, keepdim=True))
