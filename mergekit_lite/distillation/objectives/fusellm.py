"""FuseLLM's and FuseChat's fusion of distributions (2401.10491, 2408.07990), and how several teachers are weighed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mergekit_lite.distillation.alignment.vocabulary import VocabularyMap
from mergekit_lite.distillation.objectives.distance import Steps, distance
from mergekit_lite.distillation.objectives.groups import sizes, summed
from mergekit_lite.distillation.objectives.options import Count, Positive
from mergekit_lite.distillation.objectives.sparse import by_group, expected, first_rows, normalised
from mergekit_lite.distillation.objectives.targets import Targets

Combine = Literal["sum", "min_ce", "avg_ce"]


@distance(
    "−Σ_v p̂(v) log q(v), p̂ ∝ p over the listed tokens that the student has",
    "FuseLLM, 2401.10491; FuseChat, 2408.07990",
    "FuseLLM and FuseChat as they were; vocabularies that share most tokens",
    "map",
    by_token=lambda options: options["fallback"] == "one_hot",
)
def cross_entropy(
    targets: Targets,
    vocabulary: VocabularyMap | None = None,
    *,
    top: Count | None = None,
    temperature: Positive = 1.0,
    fallback: Literal["skip", "one_hot"] = "skip",
) -> Steps:
    """Return the cross entropy of the student with the teacher's listed tokens, normalised over those it has.

    It is compared at the first token of a group, where both have read the same bytes; the released code has tokens that
    a dynamic program pairs. Two of the teacher's tokens that are one of the student's have the sum of their
    probabilities; the released code drops the second. The released code keeps the ``top`` 10.

    Args:
        targets: of the teacher.
        vocabulary: None where the teacher's is the student's.
        top: how many of the teacher's likeliest tokens to take; all by default.
        temperature: of the teacher's distribution.
        fallback: what other positions are, and those where the student has none of the listed tokens: left out, or as
            in FuseChat −log q of the student's next token (FuseLLM has the one that it has just read). With ``one_hot``
            the loss of a group is the mean over all of its positions, and the group counts as often as it has such:
            so the loss of a batch is the mean over its positions, as published.
    """
    rows = first_rows(targets, vocabulary, top)
    student = yield rows.ask(len(targets.student_groups))
    target = normalised(rows.log_probs.to(student.at.dtype) / temperature).exp()
    losses = expected(target, -student.at[rows.places])
    if fallback == "skip":
        return by_group(losses, rows.groups, targets.groups)
    compared = rows.places[(rows.ids >= 0).any(1)]
    others = torch.ones_like(targets.student_groups, dtype=torch.bool)
    others[compared] = False
    total = by_group(losses, rows.groups, targets.groups)
    total = total + summed((-student.log_probs).where(others, 0.0), targets.student_groups, targets.groups)
    return total / sizes(targets.student_groups, targets.groups).clamp(min=1)


def combined_weights(cross_entropies: Tensor, combine: Combine) -> Tensor:
    """Return the weights (B, S) of S teachers in each of B rows.

    ``sum``: 1 each. ``min_ce``: 1 for the teacher with the least cross-entropy, the first of equal ones. ``avg_ce``:
    softmax over the teachers of e^−CE, which is nearly even. A teacher whose cross-entropy is NaN has weight 0.

    The released code compares e^−CE in bfloat16, where cross-entropies within 0.4 % are equal and NaN is the largest;
    here the smaller one wins, and NaN never.

    Args:
        cross_entropies: (B, S) floating; of the teachers with the row's response, mean over its tokens, in nats.
        combine: how.
    """
    unknown = cross_entropies.isnan()
    if combine == "sum":
        weights = torch.ones_like(cross_entropies)
    elif combine == "min_ce":
        best = cross_entropies.masked_fill(unknown, torch.inf)
        # argmin may return any of equal ones; the order of the index breaks ties.
        first = (best == best.min(1, keepdim=True).values) & ~unknown
        weights = (first & (first.cumsum(1) == 1)).to(cross_entropies.dtype)
    else:
        rewards = torch.exp(-cross_entropies).masked_fill(unknown, -torch.inf)
        weights = rewards.softmax(1).nan_to_num(0.0)  # of a row of NaN alone
    return weights.masked_fill(unknown, 0.0)
