"""A teacher's likeliest tokens in the student's vocabulary, beside what the student says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_lite.distillation.alignment.vocabulary import VocabularyMap
from mergekit_lite.distillation.objectives.distance import Ask, Student
from mergekit_lite.distillation.objectives.groups import firsts
from mergekit_lite.distillation.objectives.targets import Targets

Tail = Literal["bucket", "ignore"]
LEAST_TAIL = 1e-7  # what float32 can tell 1 − Σ p from 0 by


@dataclass(frozen=True)
class Rows:
    """N rows of a teacher's K likeliest tokens, each with the student's position that it is compared at.

    Attributes:
        places: (N,) int64; the student's positions, distinct.
        groups: (N,) int64.
        ids: (N, K) int64; tokens of the student, distinct in a row; −1 for none.
        log_probs: (N, K); log p, −inf where the id is −1.
    """

    places: Tensor
    groups: Tensor
    ids: Tensor
    log_probs: Tensor

    @property
    def tail(self) -> Tensor:
        """(N,); log of what the listed tokens leave of 1, at least ``LEAST_TAIL``."""
        return (1 - self.log_probs.exp().sum(1)).clamp(min=LEAST_TAIL).log()

    def ask(self, positions: int) -> Ask:
        """Return the question for log q of the listed tokens, of a student with R positions."""
        ids = self.ids.new_full((positions, self.ids.shape[1]), -1)
        ids[self.places] = self.ids
        return Ask(ids)

    def beside(self, student: Student, tail: Tail) -> tuple[Tensor, Tensor]:
        """Return log p and log q (N, K or K + 1) over the same events; −inf in both where there is none.

        With ``bucket`` the last event is any other token; with ``ignore`` both are normalised over the listed tokens.
        The bucket is left out where the list has the student's whole vocabulary.
        """
        at, rest = student.at[self.places], student.rest[self.places]
        empty = rest.detach().isneginf()
        log_p = self.log_probs.to(at.dtype)
        if tail == "ignore":
            return normalised(log_p), normalised(at)
        others = (each.masked_fill(empty, -torch.inf)[:, None] for each in (self.tail.to(at.dtype), rest))
        p, q = (torch.cat(both, 1) for both in zip((log_p, at), others, strict=True))
        return p, q


def first_rows(targets: Targets, vocabulary: VocabularyMap | None, top: int | None = None) -> Rows:
    """Return the teacher's rows where both have read the same bytes: at the first token of each group.

    Args:
        targets: of the teacher.
        vocabulary: None where the teacher's is the student's.
        top: how many of the likeliest tokens to take; all by default.
    """
    mine, theirs = (firsts(groups, targets.groups) for groups in (targets.student_groups, targets.teacher_groups))
    groups = ((mine >= 0) & (theirs >= 0)).nonzero()[:, 0]
    theirs = theirs[groups]
    ids, log_probs = targets.top_ids[theirs, :top], targets.top_log_probs[theirs, :top]
    if vocabulary is None:
        return Rows(mine[groups], groups, ids.masked_fill(log_probs.isneginf(), -1), log_probs)
    return Rows(mine[groups], groups, *mapped(ids, log_probs, student_ids(vocabulary, ids.device)))


def student_ids(vocabulary: VocabularyMap, device: torch.device) -> Tensor:
    """Return the map as a tensor (V_teacher,) int64."""
    return torch.from_numpy(vocabulary.student_ids).to(device, torch.int64)


def mapped(ids: Tensor, log_probs: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return a teacher's listed tokens (N, K) as the student's, distinct in a row, and their log-probabilities.

    Tokens that the student doesn't have are left out: −1, −inf. Those that are one token of the student become one,
    with the sum of their probabilities.

    Args:
        ids: (N, K) int64; of the teacher.
        log_probs: (N, K).
        own: (V_teacher,) int64; the student's tokens, −1 for none.
    """
    theirs = own_ids(own, ids).masked_fill(log_probs.isneginf(), -1)
    theirs, order = theirs.sort(1)
    new = torch.ones_like(theirs, dtype=torch.bool)
    new[:, 1:] = theirs[:, 1:] != theirs[:, :-1]
    slots = new.cumsum(1) - 1
    probs = log_probs.gather(1, order).exp().masked_fill(theirs < 0, 0.0)
    summed = torch.zeros_like(probs).scatter_add(1, slots, probs)
    return torch.full_like(ids, -1).scatter(1, slots, theirs), summed.log()


def own_ids(own: Tensor, ids: Tensor) -> Tensor:
    """Return the student's tokens for a teacher's ids; −1 for those that a head has beyond its tokenizer, too."""
    return own[ids.clamp(max=len(own) - 1)].masked_fill(ids >= len(own), -1)


def normalised(log_probs: Tensor) -> Tensor:
    """Return log-probabilities (N, K) over what is listed; a row without any stays −inf."""
    total = log_probs.logsumexp(1, keepdim=True)
    return log_probs - total.masked_fill(total.detach().isneginf(), 0.0)


def expected(weights: Tensor, values: Tensor) -> Tensor:
    """Return Σ w · value (N,) over rows (N, K), events of weight 0 left out: their values may be infinite."""
    counted = weights > 0
    return (weights * values.where(counted, 0.0)).where(counted, 0.0).sum(1)


def by_group(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the values (N,) at their distinct groups (N,), 0 at others: (G,)."""
    return values.new_zeros(count).index_put((groups,), values)
