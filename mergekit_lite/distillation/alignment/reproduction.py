"""FuseLLM's (2401.10491) and FuseChat's (2402.16107) alignment as they were released: to repeat their runs, no more.

Sequences are warped onto each other by the edit distances of their tokens, not cut where the text is the same
(``groups.py``): O(nm), and wrong where a token is more like its neighbour's counterpart than like its own (``s`` of
``get s`` is nearer to ``it`` than to ``gets``). What can't be compared is made up, as one token of logit 1.

What the released code does when FuseChat's rule for several steps leaves none of them isn't here: its collator takes
the pivot's own distribution there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from mergekit_lite.checkpoint.tokenizer_file import WORD
from mergekit_lite.distillation.alignment.edit_distance import edit_distance
from mergekit_lite.distillation.alignment.spelling import Spelling, spelling_of
from mergekit_lite.distillation.alignment.vocabulary import NOBODY, VocabularyMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Released = Literal["fusellm", "fusechat"]
MADE_UP = 1.0  # logit of a token where distributions can't be compared
WITHIN = 0.1  # factor on the distance of two tokens of which one contains the other
MOVES = {"fusellm": ((1, 1), (1, 0), (0, 1)), "fusechat": ((1, 1), (0, 1), (1, 0))}  # (source, pivot), by preference


def bare(token: str) -> str:
    """Return a token as it is written, without its mark of a blank."""
    return token.removeprefix("Ġ").removeprefix(WORD)


def warped(pivot: Sequence[str], source: Sequence[str], released: Released = "fusechat") -> tuple[list[list[int]], int]:
    """Warp a source's tokens onto the pivot's: for each of these the source's steps, ascending; and the cost.

    D[i, j] = edit distance of source i and pivot j + the least of D[i−1, j−1], D[i−1, j], D[i, j−1]. Of equal paths the
    trace back takes the diagonal first; then FuseLLM steps back in the source, FuseChat in the pivot.

    Args:
        pivot: its tokens, at least one.
        source: its tokens, at least one.
        released: whose order of ties.
    """
    own, other = [bare(token) for token in pivot], [bare(token) for token in source]
    cost = [[0.0, *[math.inf] * len(own)]]  # with a row and a column before the first
    for theirs in other:
        row, above = [math.inf], cost[-1]
        for j, ours in enumerate(own):
            row.append(edit_distance(theirs, ours) + min(above[j], above[j + 1], row[j]))
        cost.append(row)
    i, j = len(other), len(own)
    steps: list[list[int]] = [[] for _ in own]
    while i:
        steps[j - 1].append(i - 1)
        before = ((i - di, j - dj) for di, dj in MOVES[released])
        i, j = min(before, key=lambda place: cost[place[0]][place[1]])  # of equal ones the first
    return [each[::-1] for each in steps], int(cost[-1][-1])


def aligned_steps(
    pivot: Sequence[str],
    source: Sequence[str],
    steps: Sequence[Sequence[int]],
    tops: Sequence[Mapping[str, float]],
    mapping: Mapping[str, str],
    *,
    released: Released,
    suffixes: bool = False,
) -> list[dict[str, float]]:
    """Return the source's distribution at each of the pivot's steps, as logits of the pivot's tokens.

    Where one step of the source stands at a step of the pivot, and its token is the pivot's, its likeliest tokens are
    mapped; of two that become one the first is kept, the other's mass is lost. Elsewhere a token is made up: FuseLLM's
    is the step's own, so that the model learns to repeat it; FuseChat's is the next one (at the end, the last).

    Args:
        pivot: its tokens.
        source: its tokens.
        steps: as of ``warped``.
        tops: for each of the source's steps the logits of its likeliest tokens, in their order.
        mapping: the pivot's token for a source's; tokens that aren't in it are dropped.
        released: whose token is made up.
        suffixes: FuseChat's rule, with a map by statistics: a token that ends with the other is as good as equal, and
            of several steps the first such one is taken, or else the last of those that make up the pivot's token.
    """
    found = []
    for number, token in enumerate(pivot):
        step = _step(token, source, steps[number], mapping, suffixes=suffixes)
        if step is None:
            made_up = number if released == "fusellm" else min(number + 1, len(pivot) - 1)
            found.append({pivot[made_up]: MADE_UP})
            continue
        kept: dict[str, float] = {}
        for candidate, logit in tops[step].items():
            if candidate in mapping:
                kept.setdefault(mapping[candidate], logit)
        found.append(kept)
    return found


def _step(
    token: str, source: Sequence[str], steps: Sequence[int], mapping: Mapping[str, str], *, suffixes: bool
) -> int | None:
    """Return which of the source's steps has the distribution for a token of the pivot; None for none."""
    if not suffixes:
        return steps[0] if len(steps) == 1 and mapping.get(source[steps[0]]) == token else None
    wanted = bare(token)
    for step in steps:
        theirs = bare(source[step])
        if theirs.endswith(wanted) or wanted.endswith(theirs):
            return step
    rest, last = wanted, None
    for step in steps if len(steps) > 1 else ():
        theirs = bare(source[step])
        if theirs and rest.startswith(theirs):
            rest, last = rest[len(theirs) :], step
    return None if rest else last


def counted_pairs(
    pivot: Sequence[int], source: Sequence[int], steps: Sequence[Sequence[int]], counts: Counter[tuple[int, int]]
) -> None:
    """Count which of the source's tokens stood at which of the pivot's: (pivot's id, source's id)."""
    counts.update((own, source[step]) for own, each in zip(pivot, steps, strict=True) for step in each)


def statistics_map(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    counts: Mapping[tuple[int, int], int],
) -> VocabularyMap:
    """Map the teacher's tokens by how often the sequences' warping put them together (FuseChat).

    The student's token is the one with the least distance · (.1 where one contains the other) · sigmoid(count) among
    those that it ever stood at, of equal ones the one of the lower id; distances are of tokens without marks of blanks.
    The factor grows with the count, so that what is seen often is put back: the reverse of what was meant. Begin and
    end of text go to their like. A token that was never seen becomes the unknown one, or the end of text.

    Args:
        student: the pivot's tokenizer.
        teacher: the source's.
        counts: as of ``counted_pairs``.
    """
    own, other = spelling_of(student), spelling_of(teacher)
    unseen = next((own.roles[role] for role in ("unk_token", "eos_token") if role in own.roles), NOBODY)
    found = np.full(other.rows, unseen, np.int32)
    least: dict[int, float] = {}
    for (token, theirs), count in sorted(counts.items()):
        value = _likeness(own, token, other, theirs) / (1 + math.exp(-count))
        if value < least.get(theirs, math.inf):
            least[theirs], found[theirs] = value, token
    for role in ("bos_token", "eos_token"):
        if role in own.roles and role in other.roles:
            found[other.roles[role]] = own.roles[role]
    return VocabularyMap(found)


def _likeness(own: Spelling, token: int, other: Spelling, theirs: int) -> float:
    ours, their_text = bare(own.text(token)), bare(other.text(theirs))
    within = ours in their_text or their_text in ours
    return edit_distance(ours, their_text) * (WITHIN if within else 1)
