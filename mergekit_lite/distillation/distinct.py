"""One prompt of each neighbourhood, as Magpie keeps them (Xu et al. 2024, arXiv 2406.08464, ``exp/gen_dis.py``).

A prompt is left out where an earlier one is nearer than a bound, whether that one was left out itself or not. The
authors look at the 500 nearest ones of each in an index, here it is all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mergekit_lite.answers.rows import Prompt
from mergekit_lite.distillation.embeddings import embeddings, scaled
from mergekit_lite.distillation.recipe.choosing import Distinct
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.errors import counted

BLOCK = 2048  # prompts that a product of matrices takes on either side
SLACK = 1e-9  # bound of the error of such products of embeddings of length 1


def distinct_prompts(
    distinct: Distinct, pool: Sequence[Prompt], where: str, folder: Path, reporter: Reporter, *, plan: bool
) -> list[Prompt]:
    """Return the prompts of a pool without those that say what an earlier one says, in the order of the pool.

    Args:
        distinct: by which embeddings, and how near is too near.
        pool: the prompts.
        where: they are, for messages.
        folder: of the embeddings that a model makes.
        reporter: is told of the progress and the number of prompts that are kept.
        plan: embed nothing; where embeddings are missing, all prompts are counted with.

    Raises:
        UsageError: embeddings have different lengths.
        CheckpointError: the model can't be loaded.
        RunError: the embeddings can't be made or written.
    """
    if not pool:
        return []
    vectors = embeddings(distinct, ((pool, where),), folder, reporter, plan=plan)
    if vectors is None:
        reporter.line(f"{where}: at most {counted(len(pool), 'prompt')} kept, as the stage `sample` embeds them")
        return list(pool)
    kept = places_of_distinct(vectors[0], distinct.within)
    of_pool = counted(len(pool), "prompt")
    reporter.line(f"{where}: {len(kept):,} of {of_pool} kept, none within {distinct.within:g} of an earlier one")
    return [pool[place] for place in kept]


def places_of_distinct(vectors: np.ndarray, within: float) -> list[int]:
    """Return the places of embeddings that no earlier one is near to, rising.

    Args:
        vectors: an embedding a row (prompts × dimensions), of any float type. Its length doesn't matter.
        within: less than this is near: the squared distance of two embeddings of length 1, 2 − 2 · their cosine.
    """
    near = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), BLOCK):
        block = scaled(vectors[start : start + BLOCK], "cosine")
        for first in range(0, start + 1, BLOCK):
            before = scaled(vectors[first : first + BLOCK], "cosine")
            squares = (block**2).sum(1)[:, None] + (before**2).sum(1) - 2 * block @ before.T
            if first == start:
                squares[np.triu_indices(len(block))] = np.inf  # the prompt itself, and later ones
            hit = (squares < within - SLACK).any(1)
            for row in np.flatnonzero(~hit & (squares < within + SLACK).any(1)):  # by differences, which are exact
                doubtful = before[squares[row] < within + SLACK]
                hit[row] = bool((((doubtful - block[row]) ** 2).sum(1) < within).any())
            near[start : start + len(block)] |= hit
    return [int(place) for place in np.flatnonzero(~near)]
