"""Universal logit distillation (2402.12030) and GOLD: sorted probabilities, which need no map of vocabularies.

Of the teacher only the K likeliest tokens and the mass of the others are known. They are compared with the student's K
likeliest; the masses of the others, on both sides, are compared as one number each. Where the teacher's list is its
whole vocabulary that is the published loss, with a smaller one it is a lower bound.

GOLD (TRL's ``GOLDTrainer``) joins the tokens of a group into one distribution: by ``bayesian``, that of the last token
times the probabilities of the earlier ones, which is the chain rule; by ``observed``, its released default, that of the
first token times the probabilities of the later ones. As released, ``observed`` looks up each token's probability in
the distribution after that token; here it is the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_lite.distillation.alignment.vocabulary import Projection, VocabularyMap
from mergekit_lite.distillation.objectives.distance import Ask, Columns, Steps, distance
from mergekit_lite.distillation.objectives.divergences import jensen_shannon
from mergekit_lite.distillation.objectives.groups import Merge, chained
from mergekit_lite.distillation.objectives.options import Share
from mergekit_lite.distillation.objectives.sparse import LEAST_TAIL, by_group, mapped, own_ids, student_ids
from mergekit_lite.distillation.objectives.targets import Targets


@distance(
    "‖sorted p − sorted q‖₁",
    "ULD, 2402.12030",
    "any vocabulary, without a map: the baseline",
    "any",
)
def uld(targets: Targets, vocabulary: None = None, *, merge: Merge = "first") -> Steps:
    """Return the L1 distance of the sorted probabilities.

    Args:
        targets: of the teacher.
        vocabulary: None.
        merge: how the tokens of a group make up one distribution: ``first`` compares those after the same text, at the
            first token of each; ``bayesian`` and ``observed`` are GOLD's.
    """
    pairs = _Pairs.of(targets, merge)
    probs = targets.top_log_probs[pairs.theirs].exp()
    student = yield Ask(largest=probs.shape[1])
    own, factor = student.largest[pairs.mine].exp(), pairs.factor(targets, student.log_probs, merge).exp()
    probs, scale = probs.to(own.dtype), pairs.scale.to(own.dtype).exp()
    tail = (1 - probs.sum(1, keepdim=True)).clamp(min=0)
    losses = _sorted_distance(probs * scale, own * factor).sum(1)
    losses = losses + (tail * scale - student.rest[pairs.mine, None].exp() * factor).abs().sum(1)
    return by_group(losses, pairs.groups, targets.groups)


@dataclass(frozen=True)
class _Hybrid:
    """How two vocabularies are compared, token by token where they match.

    Attributes:
        own: (V_teacher,) int64; the student's token that matches, −1 for none.
        unmatched: (V,) bool; the student's tokens that match none.
        mass: sums the probabilities of these; None where there are none.
        matched: the number of the teacher's tokens that match.
    """

    own: Tensor
    unmatched: Tensor
    mass: Columns | None
    matched: int


def _hybrid(own: Tensor, size: int, like: Tensor) -> _Hybrid:
    unmatched = torch.ones(size, dtype=torch.bool, device=own.device)
    unmatched[own[own >= 0]] = False
    tokens = unmatched.nonzero()[:, 0]
    mass = Columns(tokens, torch.zeros_like(tokens), like.new_ones(len(tokens)), 1) if len(tokens) else None
    return _Hybrid(own, unmatched, mass, int((own >= 0).sum()))


def _by_map(vocabulary: VocabularyMap | None, targets: Targets, size: int, **_: object) -> _Hybrid:
    ids = targets.top_ids
    own = torch.arange(size, device=ids.device) if vocabulary is None else student_ids(vocabulary, ids.device)
    return _hybrid(own, size, targets.log_probs)


def _by_projection(
    vocabulary: Projection, targets: Targets, size: int, *, threshold: float = 0.6, **_: object
) -> _Hybrid:
    """Match each of the student's tokens with its main token of the teacher; of several, the one with most weight."""
    device = targets.top_ids.device
    ids, weights = (torch.from_numpy(each).to(device) for each in (vocabulary.teacher_ids, vocabulary.weights))
    weight, place = weights.max(1)
    main = ids.gather(1, place[:, None])[:, 0].long()
    rows = ((main >= 0) & (weight >= threshold)).nonzero()[:, 0]
    # The last write wins nowhere by rule, so the order decides before: one row remains for each of the teacher's.
    order = torch.argsort(weight[rows], descending=True, stable=True)
    rows = rows[order][torch.argsort(main[rows[order]], stable=True)]
    new = torch.ones_like(rows, dtype=torch.bool)
    new[1:] = main[rows][1:] != main[rows][:-1]
    own = torch.full((vocabulary.width,), -1, device=device)
    own[main[rows[new]]] = rows[new]
    return _hybrid(own, size, targets.log_probs)


@distance(
    "w Σ_matched JSD_β(P, Q) + (1 − w) ‖sorted P − sorted Q‖₁ of the others; P, Q of a group by the chain rule",
    "GOLD, TRL's GOLDTrainer",
    "vocabularies that share most tokens; not where one has numbers digit by digit",
    "map",
    prepare=_by_map,
)
def gold(
    targets: Targets,
    vocabulary: _Hybrid,
    *,
    merge: Literal["bayesian", "observed"] = "bayesian",
    beta: Share = 0.5,
    matched_weight: Share | None = None,
) -> Steps:
    """Return GOLD's hybrid: a generalised Jensen–Shannon divergence of matched tokens, sorted L1 of the others.

    The teacher's tail is spread evenly over its tokens that aren't listed: so much of it as is matched is one event
    beside the student's other matched tokens, the rest is compared with its other unmatched ones.

    Args:
        targets: of the teacher.
        vocabulary: as ``prepare`` returns it.
        merge: how the tokens of a group make up one distribution.
        beta: of ``jsd``.
        matched_weight: w; by default the share of the teacher's tokens that match.
    """
    return (yield from _hybrid_distance(targets, vocabulary, merge, beta, matched_weight))


@distance(
    "w Σ_matched [P log(P/Q) − P + Q] + (1 − w) ‖sorted P − sorted Q‖₁ of the others; matched by W",
    "X-Token's H-KL, 2605.21699",
    "as GOLD, where few tokens are the same strings",
    "projection",
    prepare=_by_projection,
)
def h_kl(
    targets: Targets, vocabulary: _Hybrid, *, threshold: Share = 0.6, matched_weight: Share | None = None
) -> Steps:
    """Return GOLD's hybrid with KL(p ‖ q), and tokens matched by the projection instead of by their strings.

    The mass of matched tokens isn't 1, and less where a group has several tokens, so the divergence is the generalised
    one: at its least where both are equal. Without − P + Q it would reward whatever makes the student's text likelier.

    Args:
        targets: of the teacher.
        vocabulary: as ``prepare`` returns it.
        threshold: the least weight of a token's main entry in W that matches it. Of several of the student's tokens
            with the same main entry the one with the most weight matches, of equal ones the first.
        matched_weight: w; by default the share of the teacher's tokens that match.
    """
    return (yield from _hybrid_distance(targets, vocabulary, "bayesian", None, matched_weight))


def _hybrid_distance(
    targets: Targets, known: _Hybrid, merge: Merge, beta: float | None, matched_weight: float | None
) -> Steps:
    """Compare two vocabularies that match in part; without ``beta`` by the generalised KL(p ‖ q)."""
    pairs = _Pairs.of(targets, merge)
    listed_ids, log_p = targets.top_ids[pairs.theirs], targets.top_log_probs[pairs.theirs]
    ids, log_matched = mapped(listed_ids, log_p, known.own)
    asked = ids.new_full((len(targets.student_groups), ids.shape[1]), -1)
    asked[pairs.mine] = ids
    among = None if known.mass is None else known.unmatched
    student = yield Ask(asked, ids.shape[1] if known.mass is not None else 0, among, known.mass)

    dtype = student.at.dtype
    log_factor, log_scale = pairs.factor(targets, student.log_probs, merge), pairs.scale.to(dtype)
    factor, scale = log_factor.exp(), log_scale.exp()
    at, largest = student.at[pairs.mine], student.largest[pairs.mine].exp()
    unmatched = student.columns[pairs.mine].sum(1, keepdim=True)
    probs = log_p.exp().to(dtype)
    listed, matches = log_p > -torch.inf, own_ids(known.own, listed_ids) >= 0
    tail = (1 - probs.sum(1, keepdim=True)).clamp(min=0)
    unlisted = known.matched - (matches & listed).sum(1, keepdim=True)
    others = (len(known.own) - listed.sum(1, keepdim=True)).clamp(min=1)
    share = unlisted / others

    def with_others(log_probs: Tensor, mass: Tensor) -> Tensor:
        event = torch.log(mass.clamp(min=LEAST_TAIL)).masked_fill(unlisted <= 0, -torch.inf)
        return torch.cat([log_probs, event], 1)

    theirs = with_others(log_matched.to(dtype), tail * share) + log_scale
    mine = with_others(at, 1 - unmatched - at.exp().sum(1, keepdim=True)) + log_factor
    matched = jensen_shannon(theirs, mine, beta or 0.0)
    if beta is None:
        matched = matched - theirs.exp().sum(1) + mine.exp().sum(1)
    likely = probs.where(listed & ~matches, 0.0).sort(1, descending=True).values
    sorted_out = _sorted_distance(likely * scale, largest * factor).sum(1)
    rest = (unmatched - largest.sum(1, keepdim=True)).clamp(min=0)
    sorted_out = sorted_out + (tail * (1 - share) * scale - rest * factor).abs().sum(1)
    weight = known.matched / len(known.own) if matched_weight is None else matched_weight
    return by_group(weight * matched + (1 - weight) * sorted_out, pairs.groups, targets.groups)


@dataclass(frozen=True)
class _Pairs:
    """The N groups that both have, with the position that each has its distribution at.

    Attributes:
        groups: (N,) int64.
        mine: (N,) int64; the student's positions.
        theirs: (N,) int64; the teacher's.
        scale: (N, 1); the log of the factor of the teacher's distributions.
    """

    groups: Tensor
    mine: Tensor
    theirs: Tensor
    scale: Tensor

    @classmethod
    def of(cls, targets: Targets, merge: Merge) -> _Pairs:
        """Pair the groups of targets."""
        theirs, scale = chained(targets.log_probs, targets.teacher_groups, targets.groups, merge)
        unknown = torch.zeros_like(targets.student_groups, dtype=targets.log_probs.dtype)
        mine, _ = chained(unknown, targets.student_groups, targets.groups, merge)
        groups = ((mine >= 0) & (theirs >= 0)).nonzero()[:, 0]
        return cls(groups, mine[groups], theirs[groups], scale[groups, None])

    def factor(self, targets: Targets, log_probs: Tensor, merge: Merge) -> Tensor:
        """Return the log of the factor (N, 1) of the student's distributions, from log q (R,) of its tokens."""
        _, factor = chained(log_probs, targets.student_groups, targets.groups, merge)
        return factor[self.groups, None]


def _sorted_distance(theirs: Tensor, mine: Tensor) -> Tensor:
    """Return |p_(i) − q_(i)| (N, …) of rows in descending order, the shorter ones continued by 0."""
    width = max(theirs.shape[1], mine.shape[1])
    theirs, mine = (torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in (theirs, mine))
    return (theirs - mine).abs()
