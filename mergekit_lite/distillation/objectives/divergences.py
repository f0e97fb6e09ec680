"""Divergences of whole distributions, over the teacher's likeliest tokens and, as one event, all the others.

Of a server, and of compact files, only a teacher's K likeliest tokens and the mass of the others are known. Over these
K + 1 events every divergence here is a lower bound of that over the whole vocabulary (merging events never adds to it),
and it is 0 only where the student gives the listed tokens the teacher's probabilities. That is ``tail: bucket``, the
default, as of TRL's server distillation. With ``tail: ignore`` both are normalised over the listed tokens: what the
student spends on others goes unseen, and at K = 1 all of it.

Where the student's tokens and the teacher's don't end together, the first of each group are compared: both follow the
same text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lite.distillation.objectives.distance import Steps, distance
from mergekit_lite.distillation.objectives.options import Share
from mergekit_lite.distillation.objectives.sparse import Tail, by_group, expected, first_rows
from mergekit_lite.distillation.objectives.targets import Targets


@distance("Σ_v p(v) log(p(v)/q(v))", "Hinton, 1503.02531", "the student is to cover all that the teacher says", "same")
def forward_kl(targets: Targets, vocabulary: None = None, *, tail: Tail = "bucket") -> Steps:
    """Return KL(p ‖ q)."""
    return (yield from _divergence(targets, 0.0, tail))


@distance(
    "Σ_v q(v) log(q(v)/p(v))", "MiniLLM, 2306.08543", "the student is to keep to what the teacher finds likely", "same"
)
def reverse_kl(targets: Targets, vocabulary: None = None, *, tail: Tail = "bucket") -> Steps:
    """Return KL(q ‖ p)."""
    return (yield from _divergence(targets, 1.0, tail))


@distance(
    "β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = βp + (1 − β)q",
    "GKD, 2306.13649",
    "between the two, and bounded",
    "same",
)
def jsd(targets: Targets, vocabulary: None = None, *, beta: Share = 0.5, tail: Tail = "bucket") -> Steps:
    """Return the generalised Jensen–Shannon divergence; β = 0 stands for ``forward_kl`` and 1 for ``reverse_kl``."""
    return (yield from _divergence(targets, beta, tail))


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Return the generalised divergence (N,) of rows (N, K), which need not be normalised; 0 and 1 are the two KL."""
    # Events that neither has would be infinity minus infinity in the gradient of log m.
    absent = log_p.detach().isneginf() & log_q.detach().isneginf()
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    p, q = log_p.exp().masked_fill(absent, 0.0), log_q.exp().masked_fill(absent, 0.0)
    if beta == 0:
        return expected(p, log_p - log_q)
    if beta == 1:
        return expected(q, log_q - log_p)
    weights = torch.tensor([1 - beta, beta], dtype=log_q.dtype, device=log_q.device).log()
    mixed = torch.logaddexp(log_q + weights[0], log_p + weights[1])
    return beta * expected(p, log_p - mixed) + (1 - beta) * expected(q, log_q - mixed)


def _divergence(targets: Targets, beta: float, tail: Tail) -> Steps:
    rows = first_rows(targets, None)
    student = yield rows.ask(len(targets.student_groups))
    return by_group(jensen_shannon(*rows.beside(student, tail), beta), rows.groups, targets.groups)
