"""Distances to teachers, without the logits of a whole batch.

As in ``answers/logprobs.py`` the head computes the logits of a chunk of positions at a time, here cut where no group of
any teacher is. One pass over a chunk's logits answers all that its distances ask (``objectives/distance.py``): the
log-probabilities of a few listed tokens a position and the mass of the others, and for those that need it a sparse
product. The rest is arithmetic on a few numbers a position. In the backward pass chunks are computed again, but for the
last one, which is still there, and their gradients overwrite their logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mergekit_lite.answers import logprobs
from mergekit_lite.answers.logprobs import Batch, Shape, head_of, shape_of
from mergekit_lite.answers.packing import Packed
from mergekit_lite.distillation.objectives.distance import Ask, Distance, Student, finish, likeliest
from mergekit_lite.distillation.objectives.targets import Targets
from mergekit_lite.distillation.training.listed import Listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def distance_losses(
    model: PreTrainedModel,
    batch: Batch | Packed,
    targets: Sequence[Targets],
    distance: Distance,
    options: Mapping[str, Any],
    vocabularies: Sequence[Any],
) -> tuple[Tensor, list[Tensor]]:
    """Compute the log-probabilities of the responses' tokens, and the distance to each teacher.

    All are differentiable. No position of the student is in memory with more than a chunk of logits
    (``LOGITS_AT_ONCE``), unless a group is longer than a chunk.

    Args:
        model: as of ``response_log_probs``.
        batch: of R scored tokens, on the model's device.
        targets: of each teacher, on the same device; their positions are those scored tokens in the batch's order.
        distance: one of ``DISTANCES``.
        options: of the distance, as ``Distance.options`` returns them.
        vocabularies: of each teacher, as ``Distance.vocabulary`` says; None where it needs none.

    Returns:
        (R,) float32; log π of the scored tokens; and for each teacher the losses (G,) float32 of its groups.

    Raises:
        ValueError: the distance needs the teacher's likeliest tokens, or a vocabulary, and they aren't there.
    """
    hidden = model.base_model(**batch.inputs, use_cache=False)[0].flatten(0, 1)
    states, tokens = hidden[batch.states], batch.targets
    head, shape = head_of(model), shape_of(model)
    size = getattr(head.weight, "ds_shape", head.weight.shape)[0]  # ZeRO-3 keeps it apart from a partitioned weight
    prepared = [
        distance.prepared(vocabulary, each, size, options)
        for vocabulary, each in zip(vocabularies, targets, strict=True)
    ]
    width = size + sum(distance.width(known) for known in prepared)
    parts = list(_parts(targets, len(tokens), max(1, logprobs.LOGITS_AT_ONCE // width)))

    def run(states: Tensor, tokens: Tensor, targets: Sequence[Targets]) -> tuple[Tensor, ...]:
        output = head(states)
        # What follows is in float32. Autocast would have its products in 16 bits, which sparse ones don't exist in.
        with torch.autocast(output.device.type, enabled=False):
            steps = [distance.function(each, known, **options) for each, known in zip(targets, prepared, strict=True)]
            log_probs, students = _answered([next(each) for each in steps], output, tokens, shape)
            return (log_probs, *(finish(*both).float() for both in zip(steps, students, strict=True)))

    found = []
    for part in parts:
        given = states[part.positions], tokens[part.positions], part.targets
        if part is not parts[-1] and torch.is_grad_enabled():
            found.append(checkpoint(run, *given, use_reentrant=False))
        else:
            found.append(run(*given))
    log_probs, *losses = (torch.cat(chunks) for chunks in zip(*found, strict=True))
    return log_probs, losses


@dataclass(frozen=True)
class _Part:
    """A chunk of the student's positions with all that the teachers say of its groups."""

    positions: slice
    targets: tuple[Targets, ...]


def _parts(targets: Sequence[Targets], positions: int, rows: int) -> Iterator[_Part]:
    """Cut R positions into parts of at most ``rows``, or of one group that is longer, as full as can be from the end.

    The groups of a part follow each other, and those of all parts are all groups, in their order.
    """
    reached = [each.student_groups.cummax(0).values.cpu() for each in targets]
    cuts = _cuts([each.student_groups.cpu() for each in targets], positions)
    ends = [positions]
    while ends[0] > 0:
        at = int(torch.searchsorted(cuts, ends[0] - rows))
        start = int(cuts[at])
        ends.insert(0, start if start < ends[0] else int(cuts[at - 1]))
    taught = [each.teacher_groups.cummax(0).values for each in targets]
    for start, end in zip(ends, ends[1:] or [0], strict=False):
        chosen = []
        for each, mine, theirs in zip(targets, reached, taught, strict=True):
            first = int(mine[start - 1]) + 1 if start else 0
            last = int(mine[end - 1]) + 1 if end < positions else each.groups
            begin, stop = (int(torch.searchsorted(theirs, group)) for group in (first, last))
            chosen.append(_taken(each, slice(start, end), slice(begin, stop), first, last))
        yield _Part(slice(start, end), tuple(chosen))


def _cuts(groups: Sequence[Tensor], positions: int) -> Tensor:
    """Return the positions (n,) from 0 to R that no group of any teacher has on both sides."""
    allowed = torch.ones(positions + 1, dtype=torch.bool)
    for each in groups:
        before = each.cummax(0).values[:-1]
        far = torch.iinfo(each.dtype).max
        after = each.where(each >= 0, far).flip(0).cummin(0).values.flip(0)[1:]
        allowed[1:positions] &= before < after
    return allowed.nonzero()[:, 0]


def _taken(targets: Targets, mine: slice, theirs: slice, first: int, last: int) -> Targets:
    """Return the targets of groups ``first`` to ``last``, counted from 0."""

    def shifted(groups: Tensor) -> Tensor:
        return (groups - first).where(groups >= 0, -1)

    return replace(
        targets,
        student_groups=shifted(targets.student_groups[mine]),
        teacher_groups=shifted(targets.teacher_groups[theirs]),
        tokens=targets.tokens[theirs],
        log_probs=targets.log_probs[theirs],
        top_ids=targets.top_ids[theirs],
        top_log_probs=targets.top_log_probs[theirs],
        groups=last - first,
    )


def _answered(asks: Sequence[Ask], output: Tensor, tokens: Tensor, shape: Shape) -> tuple[Tensor, list[Student]]:
    """Return log q (R,) of the tokens, and the answer to each question, from one pass over the head's output (R, V)."""
    lists = []
    for ask in asks:
        ids = tokens.new_empty(len(tokens), 0) if ask.ids is None else ask.ids
        largest = likeliest(output.detach(), ask) if ask.largest else ids[:, :0]
        lists.append((ids, largest))
    union, places = _union(tokens, [torch.cat(both, 1) for both in lists])
    columns = [ask.columns for ask in asks if ask.columns is not None]
    log_q, others, products = Listed.apply(output, union, tokens, shape, columns)  # type: ignore[no-untyped-call]
    log_q = log_q.masked_fill(union < 0, -torch.inf)
    log_probs = log_q.gather(1, places[0])[:, 0]
    students, product = [], iter(products.split([each.count for each in columns], 1))
    for ask, (ids, largest), where in zip(asks, lists, places[1:], strict=True):
        listed = log_q.gather(1, where.clamp(min=0)).masked_fill(where < 0, -torch.inf)
        at, likely = listed.split((ids.shape[1], largest.shape[1]), 1)
        asked = _flags(union).scatter(1, where.where(where >= 0, union.shape[1]), True)[:, :-1]
        beside = log_q.masked_fill(asked, -torch.inf)
        rest = torch.cat([beside, others[:, None]], 1).logsumexp(1)
        found = log_q[:, :0] if ask.columns is None else next(product)
        students.append(Student(tokens, log_probs, at, rest, likely, found))
    return log_probs, students


def _flags(union: Tensor) -> Tensor:
    """Return (R, U + 1) False, the last column for what is nowhere."""
    return torch.zeros(len(union), union.shape[1] + 1, dtype=torch.bool, device=union.device)


def _union(tokens: Tensor, lists: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the distinct ids (R, U) of tokens (R,) and lists (R, K), and where each of them is there; −1 for none."""
    every = torch.cat([tokens[:, None], *lists], 1)
    ids, order = every.sort(1, descending=True)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slots = new.cumsum(1) - 1
    union = torch.full_like(ids, -1).scatter(1, slots, ids)
    places = torch.empty_like(ids).scatter(1, order, slots).where(every >= 0, -1)
    return union, list(torch.split(places, [1, *(each.shape[1] for each in lists)], 1))
