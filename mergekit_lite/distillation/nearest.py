"""The prompts of a pool that are nearest to target prompts: data-efficient finetuning by cross-task neighbours.

Each of the target prompts has its k nearest prompts of the pool, and all of these together are kept (Ivison et al.
2023, arXiv 2212.00196, who search an approximate index; here distances are exact).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mergekit_lite.answers.rows import Prompt
from mergekit_lite.distillation.embeddings import embeddings, scaled, with_embeddings
from mergekit_lite.distillation.recipe.choosing import Nearest
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.errors import UsageError, counted, listing

BLOCK = 4096  # prompts of the pool that a product of matrices takes at once
CELLS = 1 << 25  # distances that are in memory at once
SLACK = 1e-10  # bound of the error of such products, relative to the squared lengths: d · ε of d dimensions, and more
SHOWN = 5


def nearest_prompts(
    nearest: Nearest,
    pool: Sequence[Prompt],
    where: str,
    folder: Path,
    reporter: Reporter,
    *,
    plan: bool,
    within: Sequence[Prompt] = (),
) -> list[Prompt]:
    """Return the prompts of a pool that are among the nearest of target prompts, in the order of the pool.

    Args:
        nearest: the targets, and how many of each.
        pool: the prompts to choose from.
        where: they are, for messages.
        folder: of the embeddings that a model makes.
        reporter: is told of the progress and the number of prompts that are kept.
        plan: embed nothing; where embeddings are missing, as many prompts as there can be stand for the nearest ones.
        within: prompts that the pool is a part of, where their embeddings by these keys are there already.

    Raises:
        UsageError: the target prompts can't be read, there is none, or embeddings have different lengths.
        CheckpointError: the model can't be loaded.
        RunError: the embeddings can't be made or written.
    """
    targets = with_embeddings(nearest.to, () if nearest.column is None else (nearest.column,))
    if not targets.prompts:
        reasons = targets.problems[:SHOWN] or ["the data have no rows"]
        raise UsageError(listing(f"There is no target prompt whose neighbours in {where} are wanted", reasons))
    if targets.problems:
        left_out = f"{counted(len(targets.problems), 'row')} of the target prompts left out"
        reporter.warn(listing(left_out, targets.problems, SHOWN))
    if not pool:
        return []
    return [pool[place] for place in _places(nearest, pool, targets.prompts, where, folder, reporter, plan, within)]


def _places(
    nearest: Nearest,
    pool: Sequence[Prompt],
    targets: Sequence[Prompt],
    where: str,
    folder: Path,
    reporter: Reporter,
    plan: bool,
    within: Sequence[Prompt],
) -> Sequence[int]:
    """Return the places of the prompts that are kept, and tell their number."""
    of_pool, of_targets = counted(len(pool), "prompt"), counted(len(targets), "target prompt")
    named = ((within or pool, where), (targets, "target prompts"))
    vectors = embeddings(nearest, named, folder, reporter, plan=plan)
    if vectors is None:
        most = min(len(pool), nearest.k * len(targets))
        reporter.line(
            f"{where}: at most {most:,} of {of_pool} will be kept, the {nearest.k:,} nearest of {of_targets}; "
            "the first ones stand for them here, as the stage `sample` embeds them"
        )
        return range(most)
    own = vectors[0]
    if within:
        rows = {prompt.id: row for row, prompt in enumerate(within)}
        own = own[[rows[prompt.id] for prompt in pool]]
    kept = places_of_nearest(own, vectors[1], nearest.k, nearest.distance)
    reporter.line(f"{where}: {len(kept):,} of {of_pool} kept: the {nearest.k:,} nearest of {of_targets}, each once")
    return kept


def places_of_nearest(pool: np.ndarray, targets: np.ndarray, k: int, distance: str) -> list[int]:
    """Return the places of all that is among the ``k`` nearest of any target, rising.

    Args:
        pool: an embedding a row (prompts × dimensions), of any float type; so are the targets.
        targets: the targets' embeddings (targets × dimensions).
        k: how many each target has, of equally near ones the earlier.
        distance: ``euclidean``, or ``cosine``, which is the Euclidean one of embeddings of length 1.
    """
    kept: set[int] = set()
    at_once = max(1, CELLS // len(pool))
    for start in range(0, len(targets), at_once):
        some = scaled(targets[start : start + at_once], distance)
        away, slack = np.empty((len(some), len(pool))), np.empty(len(pool))
        for first in range(0, len(pool), BLOCK):
            block = scaled(pool[first : first + BLOCK], distance)
            squares = (block**2).sum(1)
            # |x − t|² without |t|², which is the same for all of a target's neighbours.
            away[:, first : first + BLOCK] = squares - 2 * some @ block.T
            slack[first : first + BLOCK] = SLACK * squares
        for target, near in zip(some, away, strict=True):
            error = slack + SLACK * float(target @ target)
            bound = np.partition(near + error, k - 1)[k - 1] if k < len(pool) else np.inf
            candidates = np.flatnonzero(near - error <= bound)
            # By differences equal embeddings are equally far, and the earlier one comes first.
            exact = ((scaled(pool[candidates], distance) - target) ** 2).sum(1)
            kept.update(candidates[np.argsort(exact, kind="stable")[:k]].tolist())
    return sorted(kept)
