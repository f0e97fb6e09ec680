"""The election of signs: per element, the sign of the sum wins, and what has the other sign is dropped.

Paper: Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv 2306.01708. A sum of zero elects +, a zero has no sign and is
always dropped, as in mergekit.
"""

from __future__ import annotations

import torch

from mergekit_lite.methods.passes import Block


def elect(votes: Block) -> torch.Tensor:
    """Let the votes elect a sign per element and turn each vote, in place, into its size where it has that sign.

    Args:
        votes: tensors of one shape and dtype; afterwards |vote| where it agrees, 0 where it doesn't.

    Returns:
        The elected signs, +1 or −1, in the same shape and dtype.
    """
    total = votes[0] + votes[1] if len(votes) > 1 else votes[0].clone()
    for vote in votes[2:]:
        total.add_(vote)
    signs = total.ge_(0).mul_(2).sub_(1)
    for vote in votes:
        vote.mul_(signs).clamp_(min=0)
    return signs


def support(sizes: Block, weights: tuple[float, ...]) -> torch.Tensor:
    """Per element the sum of the weights of those that agree; never zero, so that it can divide.

    Where no weight is below zero, a sum of zero divides nothing but zeros, and becomes the smallest number; else 1.

    Args:
        sizes: what ``elect`` made of the votes.
        weights: one for each.
    """
    total = torch.gt(sizes[0], 0, out=torch.empty_like(sizes[0])).mul_(weights[0])
    mask = torch.empty_like(total)
    for size, weight in zip(sizes[1:], weights[1:], strict=True):
        total.add_(torch.gt(size, 0, out=mask), alpha=weight)
    if min(weights) >= 0:
        return total.clamp_(min=torch.finfo(total.dtype).tiny)
    return total.add_(torch.eq(total, 0, out=mask))
