"""Fine-tunes merged matrix by matrix, by the singular vectors of their deltas. Experimental.

Papers: Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081 (TSV-M); Marczak et al., "No Task Left
Behind: Isotropic Model Merging", ICML 2025, arXiv 2502.04959 (Iso-C, Iso-CTS); Choi et al., "Revisiting Weight
Averaging for Model Merging", 2024, arXiv 2412.12153 (CART), as released beside Panariello et al., "Core Space", 2025,
arXiv 2509.17786.

With δ = x − base of N models, each m × n with r = min(m, n) singular values, and U S Vᵀ a singular value decomposition:

    out = base + lambda·τ, of cart base + τ
    iso_c     τ = mean(S)·U Vᵀ, where Σδ = U S Vᵀ
    tsv       τ = polar(U₁ … U_N)·diag(S₁ … S_N)·polar(V₁ … V_N)ᵀ of the first ⌊r/N⌋ singular vectors of each δ, of
              all r where ``lossless``; polar(X) = P Qᵀ of X = P D Qᵀ, the nearest matrix with orthonormal vectors
    iso_cts   τ = mean(S)·polar(U)·polar(V)ᵀ of the first c singular vectors of Σδ, and of the first (r − c)/N of each
              δ − U_c U_cᵀ δ, what is outside the common space; c = ⌊r·common_space_fraction⌋, shifted so that the rest
              is a multiple of N
    cart      τ = δ̄ + lambda·Σ (the first ⌈p·r⌉ singular vectors and values of δ − δ̄), where δ̄ = mean(δ)

Of two models ``cart`` is the mean, whatever its numbers: their deviations from it cancel.

Their evidence is vision models (CLIP with a classifier for each task), not language models: measure before you trust
them.

Only matrices of linear layers are merged so. Embeddings, heads, and whatever isn't a matrix (norms, biases, experts
stacked in one tensor) get base + lambda·mean(δ), with ``cart`` base + mean(δ); so do matrices with fewer rows or
columns than there are models, in which no model would have a direction of its own. The released code decomposes
embeddings and heads too where nobody leaves them out by name: ``matrices: all``, which a recipe can say for some
tensors by a filter.

A matrix is decomposed whole, in float64, by the eigenvectors of its smaller Gram matrix: on a GPU where the merge runs
on one, else by one core for each worker. Each worker holds one matrix at a time, which the plan's figure of memory
counts; fewer ``--threads`` take less. Singular values below a millionth of the largest count as zero, and their
directions are left out: the released code takes whatever directions its library happens to return there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from mergekit_lite.deferred import torch
from mergekit_lite.methods.contract import Merge, Steps, TensorInfo
from mergekit_lite.methods.matrices import (
    NEGLIGIBLE,
    Deltas,
    Matrices,
    Singular,
    added,
    directions,
    is_taken,
    isotropic,
    mean,
    polar,
    singular,
    strongest,
)
from mergekit_lite.methods.parameters import Doc, Share
from mergekit_lite.methods.registry import method

Lambda = Annotated[float, Doc("scales what is added; the papers choose it on validation data.")]
Deviation = Annotated[float, Doc("scales the deviations.")]
TSV = "Gargiulo et al. 2025, arXiv 2412.00081"
ISO = "Marczak et al. 2025, arXiv 2502.04959"


@method(given="fine-tunes", formula="base + lambda·mean(S)·U Vᵀ, U S Vᵀ = Σδ", source=ISO)
def iso_c(info: TensorInfo, *, lambda_: Lambda = 1.0, matrices: Matrices = "linear") -> Merge | Steps:
    """Give all directions of the summed deltas the same strength, their mean. Experimental."""
    if not is_taken(info, matrices):
        return mean(info, lambda_)
    return added(lambda deltas: isotropic(deltas.total()), 4 * info.numel + 4 * min(info.shape) ** 2, lambda_)


@method(
    given="fine-tunes",
    formula="base + lambda·polar(U₁ … U_N)·diag(S₁ … S_N)·polar(V₁ … V_N)ᵀ, U S Vᵀ of each δ",
    source=TSV,
)
def tsv(
    info: TensorInfo, *, lossless: bool = False, lambda_: Lambda = 1.0, matrices: Matrices = "linear"
) -> Merge | Steps:
    """Make the singular vectors of different models orthogonal to each other, and add up (TSV-M). Experimental.

    Args:
        lossless: take all singular vectors of each model, not its share of them.
    """
    if not is_taken(info, matrices):
        return mean(info, lambda_)
    (rows, columns), rank = info.shape, min(info.shape)
    count = rank if lossless else rank // info.models
    vectors = info.models * count * (rows + columns)
    return added(lambda deltas: _decorrelated(deltas, count), 3 * info.numel + 3 * vectors + 4 * rank**2, lambda_)


def _decorrelated(deltas: Deltas, count: int) -> torch.Tensor:
    left, values, right = _side_by_side([singular(delta, count) for delta in deltas])
    return (polar(left) * values) @ polar(right).mT


@method(
    given="fine-tunes", formula="base + lambda·mean(S)·polar(U)·polar(V)ᵀ, U S Vᵀ common and of each model", source=ISO
)
def iso_cts(
    info: TensorInfo, *, common_space_fraction: Share = 0.8, lambda_: Lambda = 1.0, matrices: Matrices = "linear"
) -> Merge | Steps:
    """Give the directions of the summed deltas, and some of each model's own, the same strength. Experimental.

    Args:
        common_space_fraction: share of the directions that are those of the sum; the models share the others.
    """
    if not is_taken(info, matrices):
        return mean(info, lambda_)
    (rows, columns), rank = info.shape, min(info.shape)
    wanted = round((rank - int(directions(common_space_fraction, rank))) / info.models)
    own = min(wanted, rank // info.models)  # of each model
    held = 5 * info.numel + 3 * rank * (rows + columns) + 4 * rank**2
    return added(lambda deltas: _common_and_own(deltas, rank - own * info.models, own), held, lambda_)


def _common_and_own(deltas: Deltas, common: int, own: int) -> torch.Tensor:
    of_sum = singular(deltas.total(), common)
    space = of_sum[0]

    def outside(delta: torch.Tensor) -> Singular:
        # Of a delta that lies in the common space nothing but rounding is left.
        least = NEGLIGIBLE * float(delta.square().mean()) * max(delta.shape)
        return singular(delta - space @ (space.mT @ delta), own, least)

    left, values, right = _side_by_side([*map(outside, deltas), of_sum])
    return (polar(left) @ polar(right).mT).mul_(values.mean())


@method(
    given="fine-tunes",
    formula="base + δ̄ + lambda·Σ top p of (δ − δ̄), δ̄ = mean(δ)",
    source="Choi et al. 2024, arXiv 2412.12153",
)
def cart(
    info: TensorInfo, *, p: Share = 0.04, lambda_: Deviation = 1.0, matrices: Matrices = "linear"
) -> Merge | Steps:
    """Add to the mean the strongest directions in which each model deviates from it. Experimental.

    Args:
        p: share of the rank that is taken of each model's deviation.
    """
    if not is_taken(info, matrices):
        return mean(info)
    rank = min(info.shape)
    count = math.ceil(directions(p, rank))
    return added(lambda deltas: _centred(deltas, count, lambda_), 7 * info.numel + 4 * rank**2)


def _centred(deltas: Deltas, count: int, scale: float) -> torch.Tensor:
    centre = deltas.total().div_(len(deltas))
    change = centre.clone()
    for delta in deltas:
        change += strongest(delta - centre, count) * scale
    return change


def _side_by_side(parts: Sequence[Singular]) -> Singular:
    left, values, right = zip(*parts, strict=True)
    return torch.cat(left, 1), torch.cat(values), torch.cat(right, 1)
