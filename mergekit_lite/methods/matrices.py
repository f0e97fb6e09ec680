"""Matrices taken whole: which tensors are, their deltas, and decompositions in float64 that leave out what is zero."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Annotated, Literal, TypeAlias

from mergekit_lite.deferred import torch
from mergekit_lite.methods.contract import Block, Merge, Reduction, Steps, TensorInfo
from mergekit_lite.methods.parameters import Doc
from mergekit_lite.ops.operations import WeightedSum

# Tensors with a row for each token, position or class: embeddings and heads, as architectures name them.
# ``proj_out`` is a head by itself alone (Whisper): within blocks it is a linear layer (diffusers).
EMBEDDING = re.compile(
    r"embed|(^|[./])(wte|wpe|emb|shared|score|classifier|decoder|output_layer)\.weight$|(^|[./_])head\.weight$"
    r"|(^|/)proj_out\.weight$|^(model[./])?output\.weight$"
)
NEGLIGIBLE = 1e-12  # a Gram matrix's eigenvalue is zero below this share of its largest: a millionth of singular values
Singular: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"  # U, S, V; vectors are columns
Matrices = Annotated[
    Literal["linear", "all", "none"],
    Doc("what is merged so: matrices of linear layers, all (embeddings and heads too), or none (the mean)."),
]


def is_taken(info: TensorInfo, matrices: str) -> bool:
    """Return whether a tensor is a matrix that is to be merged as one, and has a direction for each model."""
    if len(info.shape) != 2 or min(info.shape) < info.models or matrices == "none":
        return False
    return matrices == "all" or EMBEDDING.search(info.name) is None


def directions(share: float, rank: int) -> Fraction:
    """Return share·rank, exactly as a reader of the two numbers has it: 0.14 of 50 is 7, which floats make more."""
    return Fraction(str(share)) * rank


def mean(info: TensorInfo, scale: float = 1.0) -> Merge:
    """Return what gives base + scale·mean(δ)."""
    return WeightedSum((scale,) * info.models, from_base=True, divisor=info.models)


class Deltas:
    """The deltas of a matrix's models, one at a time, each made anew when it is asked for: float64."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._base = block[0]

    def __len__(self) -> int:
        return len(self._block) - 1

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self._block[number] - self._base for number in range(1, len(self._block)))

    def total(self) -> torch.Tensor:
        """Return the sum of the deltas: a new tensor."""
        total = torch.zeros_like(self._base)
        for delta in self:
            total += delta
        return total


def added(change: Callable[[Deltas], torch.Tensor], held: int, scale: float = 1.0) -> Steps:
    """Add scale·change(deltas) to the base, the change being a matrix in float64.

    ``held`` is how many numbers of float64 are in memory at once for ``change``, all in all.
    """
    whole = yield Reduction(lambda block, _: change(Deltas(block)).mul_(scale).reshape(-1), held=held)

    def merged(block: Block, start: int) -> torch.Tensor:
        part = whole[start : start + block[0].numel()]
        return block[0].add(part).to(block[0].dtype)  # type: ignore[arg-type]

    return merged


def eigen(symmetric: torch.Tensor, least: float = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues of a Gram matrix, the smallest first, and its eigenvectors as columns.

    Eigenvalues up to ``least`` or to ``NEGLIGIBLE`` of the largest are 0. What isn't finite makes everything NaN.
    """
    if not bool(torch.isfinite(symmetric).all()):
        return symmetric.new_full(symmetric.shape[:1], torch.nan), torch.full_like(symmetric, torch.nan)
    values, vectors = torch.linalg.eigh(symmetric)
    return values.masked_fill_(values <= max(NEGLIGIBLE * float(values[-1]), least), 0), vectors


def inverse(values: torch.Tensor) -> torch.Tensor:
    """Return 1/value, and 0 for what is 0."""
    return torch.where(values == 0, 0, 1 / values)


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """Return P Qᵀ of a matrix P D Qᵀ, without the directions in which it is zero: float64 of its shape."""
    return _polar_and_values(matrix)[0]


def isotropic(matrix: torch.Tensor) -> torch.Tensor:
    """Return mean(S)·U Vᵀ of a matrix U S Vᵀ, the mean being over all min(m, n) singular values."""
    factor, values = _polar_and_values(matrix)
    return factor.mul_(values.mean())


def _polar_and_values(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if matrix.shape[0] > matrix.shape[1]:
        factor, values = _polar_and_values(matrix.mT)
        return factor.mT, values
    squares, vectors = eigen(matrix @ matrix.mT)
    values = squares.sqrt()
    return (vectors * inverse(values)) @ (vectors.mT @ matrix), values


def singular(matrix: torch.Tensor, count: int, least: float = 0) -> Singular:
    """Return the first singular vectors and values of a matrix (m, n): U (m, count), S (count,), V (n, count).

    The largest is last. Where a singular value is zero, so are its vectors; it is where its square is up to ``least``.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = singular(matrix.mT, count, least)
        return left, values, right
    squares, vectors = eigen(matrix @ matrix.mT, least)
    first = len(squares) - count
    values, left = squares[first:].sqrt(), vectors[:, first:]
    return left * (values != 0), values, (matrix.mT @ left) * inverse(values)


def strongest(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Return the part of a matrix that its first ``count`` singular vectors make up."""
    if matrix.shape[0] > matrix.shape[1]:
        return strongest(matrix.mT, count).mT
    vectors = eigen(matrix @ matrix.mT)[1][:, matrix.shape[0] - count :]
    return vectors @ (vectors.mT @ matrix)
