"""Chunk-level beam search: every few tokens, the drafts that the aligned model prefers go on (Zhou et al. 2024).

Weak-to-strong search (arXiv 2405.19262, algorithm 1) draws K successors of ``length`` tokens for each of W drafts, and
keeps the W best of them by

    log π_aligned(draft | prompt) − log π_sft(draft | prompt)

over the whole draft, until all have ended. With W 1 and a length without limit it is best-of-K.

The drafts form a set, as in the paper: one that has ended is one, and doesn't displace others by copies of itself. In
the authors' program it is repeated like the others, so the first best draft that ends soon fills the beam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergekit_lite.previewing.drafts import Drafts


@dataclass(frozen=True)
class Beam:
    """The size of a search. The defaults are the authors'."""

    width: int = 4  # drafts that go on
    successors: int = 4  # of each
    length: float = 10  # tokens between two choices; infinite for none

    @property
    def drafts(self) -> int:
        """How many drafts grow at once."""
        return self.width * self.successors


OnDrafts = Callable[[Drafts], None]  # called after each step


def grown(drafts: Drafts, most: int, watch: OnDrafts) -> list[int]:
    """Let one draft of each alpha grow to its end, or to ``most`` tokens; return them in the order of the alphas."""
    while drafts.tokens.shape[1] < most and drafts.grow():
        watch(drafts)
    return list(range(len(drafts.tokens)))


def searched(drafts: Drafts, most: int, watch: OnDrafts, beam: Beam, aligned: int, sft: int) -> list[int]:
    """Search for the best draft of each alpha; return them in the order of the alphas.

    Args:
        drafts: ``beam.drafts`` of each alpha, empty.
        most: tokens of a draft.
        watch: called after each step.
        beam: the size of the search.
        aligned: which model is preferred.
        sft: which one it is compared with.
    """
    while True:
        until = min(most, drafts.tokens.shape[1] + beam.length)
        while drafts.tokens.shape[1] < until and drafts.grow():
            watch(drafts)
        kept = [_best(drafts, alpha, beam.width, aligned, sft) for alpha in range(drafts.weights.shape[1])]
        if drafts.tokens.shape[1] >= most or all(drafts.ended[draft] for best in kept for draft in best):
            return [best[0] for best in kept]
        chosen: list[int] = []
        numbers: list[int] = []
        for best in kept:
            for rank, draft in enumerate(best):
                times = 1 if drafts.ended[draft] else beam.successors
                chosen += [draft] * times
                numbers += range(rank * beam.successors, rank * beam.successors + times)
        drafts.select(chosen, numbers)


def preference(drafts: Drafts, draft: int, aligned: int, sft: int) -> float:
    """Return log π_aligned − log π_sft of a draft; minus infinity where a model doesn't have a token."""
    value = float(drafts.log_probs[aligned, draft] - drafts.log_probs[sft, draft])
    return -math.inf if math.isnan(value) else value


def _best(drafts: Drafts, alpha: int, width: int, aligned: int, sft: int) -> Sequence[int]:
    """Return the best distinct drafts of an alpha, at most ``width``, the best one first."""
    own = [draft for draft in range(len(drafts.tokens)) if drafts.alphas[draft] == alpha]
    distinct = {tuple(drafts.answer(draft)): draft for draft in reversed(own)}.values()  # of equal ones the first
    return sorted(distinct, key=lambda draft: (-preference(drafts, draft, aligned, sft), draft))[:width]
