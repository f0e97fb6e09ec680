"""X-Token's P-KL (2605.21699): the student's probabilities projected into the teacher's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lite.distillation.alignment.vocabulary import Projection
from mergekit_lite.distillation.objectives.distance import Ask, Columns, Steps, distance
from mergekit_lite.distillation.objectives.groups import sizes, summed
from mergekit_lite.distillation.objectives.options import Count, Positive
from mergekit_lite.distillation.objectives.targets import Targets


@dataclass(frozen=True)
class _Projected:
    """The teacher's tokens that are compared, C of them, and W's entries for these.

    Attributes:
        columns: W, as far as it leads to them.
        places: (V_teacher,) int64; the column of each of the teacher's tokens, −1 for none.
    """

    columns: Columns
    places: Tensor


def _prepared(
    vocabulary: Projection,
    targets: Targets,
    size: int,
    *,
    columns: int = 8192,
    temperature: float = 1.0,
    **_: object,
) -> _Projected:
    """Choose the columns: the same for all parts of a batch."""
    device = targets.top_ids.device
    theirs = torch.from_numpy(vocabulary.teacher_ids).to(device, torch.int64)
    weights = torch.from_numpy(vocabulary.weights).to(device)
    entries = ((theirs >= 0) & (weights > 0)).nonzero(as_tuple=True)
    reached = theirs[entries]
    counted = targets.teacher_groups >= 0
    ids, log_probs = targets.top_ids[counted].flatten(), targets.top_log_probs[counted].flatten()
    width = int(max(ids.amax().item() if len(ids) else 0, reached.amax().item() if len(reached) else 0)) + 1
    best = log_probs.new_full((width,), -torch.inf).scatter_reduce(0, ids, log_probs, "amax")
    within = torch.zeros(width, dtype=torch.bool, device=device)
    within[reached] = True
    likeliest = best.masked_fill(~within, -torch.inf).sort(descending=True, stable=True)
    chosen = likeliest.indices[:columns][likeliest.values[:columns] > -torch.inf]
    places = torch.full((width,), -1, device=device)
    places[chosen] = torch.arange(len(chosen), device=device)
    kept = places[reached] >= 0
    tokens, slots = entries[0][kept], places[reached[kept]]
    matrix = Columns(tokens, slots, weights[entries][kept], len(chosen), temperature)
    return _Projected(matrix, places)


@distance(
    "T² Σ_c P(c) log(P(c)/Q(c)), Q ∝ the mean of qW, log P the mean of log p over the group",
    "X-Token's P-KL, 2605.21699",
    "the best published figures across tokenizers",
    "projection",
    prepare=_prepared,
    width=lambda known: 6 * known.columns.count,
)
def p_kl(
    targets: Targets,
    vocabulary: _Projected,
    *,
    columns: Count = 8192,
    temperature: Positive = 1.0,
    reverse: bool = False,
) -> Steps:
    """Return the divergence of a group's mean distributions, in the teacher's vocabulary.

    The student: softmax(z/T) of each of the group's tokens through W, their mean, normalised over the columns. The
    teacher: log-softmax over the columns of log p / T of each of its tokens, their mean, which is not normalised again.
    The two are not treated alike; that is how it was released.

    A column is one of the teacher's tokens. With dense logits they are those with the largest logits of the batch. Here
    only K tokens a position are known, so they are the listed tokens of the batch, those with the largest log p first,
    as far as any of the student's tokens leads to them in W: what it can't say isn't asked of it. At a position whose
    list lacks a column, what its list leaves of 1 is spread evenly over the columns that it lacks, each at most as
    likely as the least likely one that is listed. All other mass is normalised away, as there. With a list that is the
    teacher's whole vocabulary, nothing is spread, and the loss is that of dense logits.

    Args:
        targets: of the teacher.
        vocabulary: as ``prepare`` returns it.
        columns: the most columns.
        temperature: T, of both.
        reverse: whether to return Σ Q log(Q/P) instead.
    """
    student = yield Ask(columns=vocabulary.columns)
    mine, theirs = (
        sizes(groups, targets.groups)[:, None] for groups in (targets.student_groups, targets.teacher_groups)
    )
    # The mean is normalised anyway, so the sum serves.
    mass = summed(student.columns, targets.student_groups, targets.groups)
    least = torch.finfo(mass.dtype).tiny
    log_q = mass.clamp(min=least).log() - mass.sum(1, keepdim=True).clamp(min=least).log()
    rows = _taught(targets, vocabulary, temperature).to(mass.dtype)
    log_p = summed(rows, targets.teacher_groups, targets.groups) / theirs.clamp(min=1)
    losses = log_q.exp() * (log_q - log_p) if reverse else log_p.exp() * (log_p - log_q)
    return temperature**2 * (losses.sum(1) * ((mine > 0) & (theirs > 0))[:, 0])


def _taught(targets: Targets, vocabulary: _Projected, temperature: float) -> Tensor:
    """Return the teacher's log-softmax (P, C) over the columns."""
    count = vocabulary.columns.count
    log_p = targets.top_log_probs
    places = vocabulary.places[targets.top_ids.clamp(max=len(vocabulary.places) - 1)]
    places = places.masked_fill(log_p.isneginf() | (targets.teacher_groups < 0)[:, None], -1)
    lacking = (count - (places >= 0).sum(1, keepdim=True)).clamp(min=1)
    tail = (1 - log_p.exp().sum(1, keepdim=True)).clamp(min=torch.finfo(log_p.dtype).tiny).log()
    least = log_p.masked_fill(log_p.isneginf(), torch.inf).amin(1, keepdim=True)
    spread = torch.minimum(tail - lacking.log(), least)
    rows = spread.expand(-1, count + 1).scatter(1, places.where(places >= 0, count), log_p)[:, :count]
    return (rows / temperature).log_softmax(1)
