"""Which experts of a layer go together, and which ones stay: pure functions of how alike and how used they are.

All work on a matrix of similarities between experts (cosines), and on how often each was chosen. Equal values are
decided for the lower number, so the result doesn't depend on the order in which anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lite.deferred import np

if TYPE_CHECKING:
    import numpy.typing as npt

    Similarities = npt.NDArray[np.float64]  # (experts, experts), symmetric: 1 for experts that are the same

Group = tuple[int, ...]
DIGITS = 9  # to which similarities are compared: sums of floats differ behind them


def most_used(counts: Sequence[int], keep: int) -> Group:
    """Return the experts that were chosen most often, in their order."""
    order = sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))
    return tuple(sorted(order[:keep]))


def least_alike(similarities: Similarities, keep: int) -> Group:
    """Return experts that are unlike each other, in their order.

    Of the two that are most alike the one goes that is more like all others that are left, on average; then the next.
    """
    rounded = np.round(similarities, DIGITS)
    left = list(range(len(rounded)))
    while len(left) > keep:
        part = rounded[np.ix_(left, left)]
        np.fill_diagonal(part, -np.inf)
        one, other = divmod(int(part.argmax()), len(left))
        np.fill_diagonal(part, 0)
        means = np.round(part.sum(axis=1), DIGITS - 1)
        del left[other if means[other] >= means[one] else one]
    return tuple(left)


def clusters(similarities: Similarities, number: int) -> list[Group]:
    """Return groups of experts: the two groups that are most alike become one, again and again.

    How alike two groups are is the mean over all pairs of an expert of each (average linkage, as in HC-SMoE, Chen et
    al. 2024, arXiv 2410.08589, which compares outputs of experts instead of weights).
    """
    groups: list[Group] = [(expert,) for expert in range(len(similarities))]
    alike = similarities.astype(np.float64)
    np.fill_diagonal(alike, -np.inf)
    while len(groups) > number:
        one, other = sorted(divmod(int(np.round(alike, DIGITS).argmax()), len(groups)))
        sizes = [len(groups[one]), len(groups[other])]
        alike[one] = np.average(alike[[one, other]], axis=0, weights=sizes)
        alike[:, one] = alike[one]
        alike[one, one] = -np.inf
        alike = np.delete(np.delete(alike, other, axis=0), other, axis=1)
        groups[one] = tuple(sorted((*groups[one], *groups[other])))
        del groups[other]
    return sorted(groups)


def around_most_used(counts: Sequence[int], similarities: Similarities, number: int) -> list[Group]:
    """Return groups around the experts that were chosen most often: each other one joins the one it is most like.

    So M-SMoE (Li et al. 2023, arXiv 2310.01334) groups experts, which aligns their neurons first; here they stay.
    """
    leaders = most_used(counts, number)
    rounded = np.round(similarities, DIGITS)
    members: dict[int, list[int]] = {leader: [leader] for leader in leaders}
    for expert in sorted(set(range(len(counts))) - {*leaders}):
        members[max(leaders, key=lambda leader: (rounded[expert, leader], -leader))].append(expert)
    return sorted(tuple(sorted(group)) for group in members.values())
