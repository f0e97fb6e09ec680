"""Spaces that adapters have in common: the products B · A of one module as small matrices, in one basis for all.

With all B side by side, B = [B₁ … B_N] (m, R), all A on top of each other (R, n), R the sum of the ranks, and scales
inside the B:

    core    (Panariello et al. 2025, arXiv 2509.17786)  U of B, V of A: BᵢAᵢ = U · Mᵢ · V          Mᵢ (R, R)
    knots   (Stoica et al. 2024, arXiv 2410.19735)      U of [B₁A₁ … B_NA_N]: BᵢAᵢ = U · Tᵢ        Tᵢ (R, n)

U has orthonormal columns, V orthonormal rows: both are singular vectors, so that lengths and angles of the products are
those of the small matrices, and a method that doesn't go element by element gives the same in a space as outside. Where
R is more than m or n, the spaces are that much smaller. Of a product nothing but its factors is ever in memory.
Singular values and right singular vectors are those of a Gram matrix, where that tells them well enough, else those of
the triangle of a QR decomposition, in full precision; the left ones follow from them. Signs of singular vectors don't
matter to any method that treats both signs alike; where singular values are equal, the basis is one of many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch

from mergekit_lite.methods.matrices import eigen

SpaceName: TypeAlias = Literal["core", "knots"]
SPACES: tuple[SpaceName, ...] = ("core", "knots")
EPSILON = torch.finfo(torch.float64).eps
EVEN = 256.0  # largest singular value / smallest up to which a Gram matrix does: U is orthonormal to EVEN² · EPSILON
LEAST = torch.finfo(torch.float64).tiny / EPSILON  # of a square: below it digits are lost


class Product(NamedTuple):
    """The two factors of a product ``b · a``: (m, r) and (r, n), float64; a scale is inside ``b``."""

    b: torch.Tensor
    a: torch.Tensor


class Cut(NamedTuple):
    """A product cut to a rank.

    Attributes:
        product: what is left of it.
        square: ‖product‖² before.
        lost: what it is away from that, squared.
        intruders: how many were scaled before, where they were looked for.
    """

    product: Product
    square: float
    lost: float
    intruders: int | None = None


@dataclass(frozen=True)
class Space:
    """A basis in which products are small.

    Attributes:
        tasks: each product in it: (p, q), or (p, n) where there is no ``right``; float64.
        stacked: all factors together: (m, R) and (R, n).
        left: (R, p): ``stacked.b @ left`` is U.
        right: (q, R): ``right @ stacked.a`` is V; None where columns are the products' own.
    """

    tasks: tuple[torch.Tensor, ...]
    stacked: Product
    left: torch.Tensor
    right: torch.Tensor | None

    def outside(self, merged: torch.Tensor, rank: int | None = None) -> Cut:
        """Return U · merged · V (or U · merged) as a product: exact, or the best of a rank.

        Args:
            merged: a matrix of the space, shaped like a task.
            rank: of the result; None for as little as is exact whatever ``merged`` is.
        """
        square = merged.square().sum().item()
        if rank is None or rank >= min(merged.shape):
            return Cut(self._whole(merged), square, 0.0)
        if self.right is None:
            # merged = L · Qᵀ: the singular vectors of L, (p, p), are merged's.
            outer, values, _ = torch.linalg.svd(torch.linalg.qr(merged.T, mode="r").R.T)
        else:
            outer, values, inner = torch.linalg.svd(merged, full_matrices=False)
        sides = values[:rank].sqrt()
        b = self.stacked.b @ (self.left @ (outer[:, :rank] * sides))
        if self.right is None:
            a = _inverted(sides, values[0])[:, None] * (outer[:, :rank].T @ merged)
        else:
            a = (sides[:, None] * inner[:rank] @ self.right) @ self.stacked.a
        return Cut(Product(b, a), square, values[rank:].square().sum().item())

    def _whole(self, merged: torch.Tensor) -> Product:
        """Return the exact product; its rank is the lesser side of ``merged``."""
        if self.right is None:
            return Product(self.stacked.b @ self.left, merged)
        if merged.shape[0] < merged.shape[1]:
            return Product(self.stacked.b @ self.left, (merged @ self.right) @ self.stacked.a)
        return Product(self.stacked.b @ (self.left @ merged), self.right @ self.stacked.a)


def core_space(products: Sequence[Product]) -> Space:
    """Return the core space of some products of one shape (m, n)."""
    stacked = _stacked(products)
    left, left_values = _right_singular(stacked.b)
    right, right_values = _right_singular(stacked.a.T)
    rows, columns = left * left_values, right * right_values  # in each, the ranks of one product after the other's
    ranks = [len(product.a) for product in products]
    tasks = tuple(x.T @ y for x, y in zip(torch.split(rows, ranks), torch.split(columns, ranks), strict=True))
    return Space(tasks, stacked, left * _inverted(left_values), (right * _inverted(right_values)).T)


def knots_space(products: Sequence[Product]) -> Space:
    """Return the space of KnOTS of some products of one shape (m, n)."""
    stacked = _stacked(products)
    outer = _triangle(stacked.b)
    ranks = [len(product.a) for product in products]
    # [B₁A₁ … B_NA_N] = Q · [R₁L₁ᵀ … R_NL_Nᵀ] · (the rows of all Qᵢ): the middle has its singular values.
    triangles = [_triangle(product.a.T).T for product in products]
    inner: torch.Tensor = torch.block_diag(*triangles)  # type: ignore[no-untyped-call]
    x, values, y = torch.linalg.svd(outer @ inner, full_matrices=False)
    x, values, y = _kept(x, values, y)
    tasks = tuple(x.T @ r @ product.a for r, product in zip(torch.split(outer, ranks, 1), products, strict=True))
    return Space(tasks, stacked, inner @ y.T * _inverted(values), None)


def _stacked(products: Sequence[Product]) -> Product:
    return Product(torch.cat([product.b for product in products], 1), torch.cat([product.a for product in products]))


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """Return the triangle of a QR decomposition: (min(m, R), R) of (m, R)."""
    triangle: torch.Tensor = torch.linalg.qr(matrix, mode="r").R
    return triangle


def _right_singular(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right singular vectors as columns, (R, k), and the singular values, (k,), without those that are noise."""
    if matrix.shape[0] >= matrix.shape[1]:  # else its Gram matrix is singular
        squares, vectors = eigen(matrix.T @ matrix, LEAST)
        if squares[0] * EVEN**2 >= squares[-1] > 0:
            return vectors.flip(1), squares.flip(0).sqrt()
    outer, values, vectors = torch.linalg.svd(_triangle(matrix), full_matrices=False)
    _, values, vectors = _kept(outer, values, vectors)
    return vectors.T, values


def _kept(
    outer: torch.Tensor, values: torch.Tensor, inner: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leave out singular values that rounding alone may have made; one always stays, of zeros too."""
    number = max(1, int((values > values[0] * inner.shape[1] * EPSILON).sum()))
    return outer[:, :number], values[:number], inner[:number]


def _inverted(values: torch.Tensor, largest: torch.Tensor | None = None) -> torch.Tensor:
    """Return 1 / values, 0 where a value is nothing beside the largest one, as is all of it where that is 0."""
    largest = values[0] if largest is None else largest.sqrt()
    return torch.where(values > largest * EPSILON, 1 / values, 0.0)
