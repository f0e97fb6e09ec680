"""Rows of earlier rounds that a round trains on again, so that what was learnt from them stays (DNO, 2404.03715)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from mergekit_lite.answers.rows import read_rows, seed_of
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.assign import floor_share
from mergekit_lite.distillation.recipe.schema import RoundRecipe
from mergekit_lite.distillation.rounds import round_of
from mergekit_lite.errors import UsageError


def replayed(recipe: RoundRecipe, name: Literal["sft", "preference"]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the last round that are trained on again, then those of the one before it, each with ``round``.

    A share is of the round's own rows, without those that it replayed itself. They are drawn by seed, round and prompt.

    Raises:
        UsageError: a round has no rows any more.
    """
    for age, share in enumerate(recipe.settings.replay[: recipe.number - 1], 1):
        number = recipe.number - age
        path = Folder(round_of(recipe.whole, number).folder).pairs(name)
        if not path.exists():
            raise UsageError(f"Round {recipe.number} replays rows of round {number}, and {path} isn't there any more.")
        rows = [line.row for line in read_rows(path, [], {"prompt": str}) if "round" not in line.row]
        order = [seed_of(recipe.seed, "replay", recipe.number, number, row["prompt"]) for row in rows]
        kept = sorted(range(len(rows)), key=lambda place: (order[place], place))[: floor_share(share, len(rows))]
        yield from ({**rows[place], "round": number} for place in sorted(kept))
