"""The groups of positions that a student's and a teacher's tokens of the same bytes make up."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Merge = Literal["bayesian", "observed", "first"]


def summed(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the sums (G, …) of values (R, …) over each group; those of group −1 are left out."""
    kept = groups >= 0
    total = values.new_zeros(count, *values.shape[1:])
    return total.index_add(0, groups[kept], values[kept])


def sizes(groups: Tensor, count: int) -> Tensor:
    """Return the number of positions (G,) of each group."""
    return torch.bincount(groups[groups >= 0], minlength=count)


def firsts(groups: Tensor, count: int) -> Tensor:
    """Return the first position (G,) of each group; −1 for a group without."""
    places = torch.arange(len(groups), device=groups.device)
    kept = groups >= 0
    found = torch.full((count,), len(groups), device=groups.device)
    found = found.scatter_reduce(0, groups[kept], places[kept], "amin")
    return found.where(found < len(groups), -1)


def lasts(groups: Tensor, count: int) -> Tensor:
    """Return the last position (G,) of each group; −1 for a group without."""
    places = torch.arange(len(groups), device=groups.device)
    kept = groups >= 0
    found = torch.full((count,), -1, device=groups.device)
    return found.scatter_reduce(0, groups[kept], places[kept], "amax")


def chained(log_probs: Tensor, groups: Tensor, count: int, merge: Merge) -> tuple[Tensor, Tensor]:
    """Return how the tokens of a group make up one distribution, not normalised.

    Args:
        log_probs: (R,); of the text's own tokens.
        groups: (R,) int64.
        count: G.
        merge: ``bayesian``: that of the last token times the probabilities of the earlier ones: the chain rule;
            ``observed``: that of the first token times the probabilities of the later ones; ``first``: that alone.

    Returns:
        (G,) int64, the position of the distribution, −1 for a group without; and (G,), the log of its factor.
    """
    places = (lasts if merge == "bayesian" else firsts)(groups, count)
    if merge == "first":
        return places, log_probs.new_zeros(count)
    others = torch.ones_like(groups, dtype=torch.bool)
    others[places[places >= 0]] = False
    return places, summed(log_probs.where(others, 0.0), groups, count)
