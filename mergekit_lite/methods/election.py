"""The election of signs: per element, the sign of the sum wins, and what has the other sign is dropped.

Paper: Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv 2306.01708. A sum of zero elects +, a zero has no sign and is
always dropped, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.deferred import torch
from mergekit_lite.methods.passes import Block


def elected(
    base: torch.Tensor,
    deltas: Block,
    votes: Sequence[float],
    shares: Sequence[float],
    weights: Sequence[float] | None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Let vote·delta elect a sign for each element, and add to the base what has it: a new tensor.

        base + scale·Σ share·vote·δ·[sign elected]   (divided by Σ weight·[sign elected] where there are weights)

    Args:
        base: any shape.
        deltas: of each model, of the base's shape and dtype. They are used up.
        votes, shares: a number for each model.
        weights: the same, or None. Where those that agree sum to zero nothing is divided.
        scale: of what is added.
    """
    for delta, vote in zip(deltas, votes, strict=True):
        delta.mul_(vote)
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    signs = total.ge_(0).mul_(2).sub_(1)
    for delta in deltas:
        delta.mul_(signs).clamp_(min=0)
    support = None if weights is None else _support(deltas, weights)
    merged = deltas[0].mul_(shares[0])
    for size, share in zip(deltas[1:], shares[1:], strict=True):
        merged.add_(size.mul_(share))
    merged.mul_(signs.mul_(scale))
    if support is not None:
        merged.div_(support)
    return merged.add_(base)


def _support(sizes: Block, weights: Sequence[float]) -> torch.Tensor:
    """Per element the sum of the weights of those that agree; never zero, so that it can divide.

    Where no weight is below zero, a sum of zero divides nothing but zeros, and becomes the smallest number; else 1.

    Args:
        sizes: |vote| where it agrees, 0 where it doesn't.
        weights: one for each.
    """
    mask = torch.empty_like(sizes[0])
    total = torch.gt(sizes[0], 0, out=mask) * weights[0]
    for size, weight in zip(sizes[1:], weights[1:], strict=True):
        total.add_(torch.gt(size, 0, out=mask).mul_(weight))
    if all(weight >= 0 for weight in weights):
        return total.clamp_(min=torch.finfo(total.dtype).tiny)
    return total.add_(torch.eq(total, 0, out=mask))
