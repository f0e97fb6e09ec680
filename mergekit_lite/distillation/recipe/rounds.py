"""What is wrong with the ``rounds`` of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lite.distillation.recipe.problems import KeyPath, Problem
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.errors import counted

ROUND = "{round}"  # in the name that a server has for the target: the number of the round


def rounds_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what contradicts ``rounds``, and what has no effect with them, or without."""
    rounds, at = recipe.rounds, ("rounds",)
    if recipe.first is not None and (rounds is None or rounds.reference == "start"):
        yield Problem(("first",), "'first' has no effect here: it is for rounds: {reference: first}")
    if rounds is None:
        return
    if recipe.rows is not None:
        yield Problem(at, "with 'rows' that are given each round would train on the same: leave 'rounds' out")
    if len(rounds.replay) >= rounds.number:
        shares, before = counted(len(rounds.replay), "share"), counted(rounds.number - 1, "round")
        yield Problem((*at, "replay"), f"'replay' has {shares}, and the last round has {before} before it")
    if rounds.replay and not recipe.train.reads_rows:
        yield Problem((*at, "replay"), "'replay' has no effect here: no training reads rows")
    if rounds.reference == "first":
        yield from _reference(recipe, (*at, "reference"))
    own = recipe.target_source
    if own is not None and own.server is not None and ROUND not in own.model:
        text = f"each round needs the model of the one before served: put {ROUND} into its 'model', or take 'serve'"
        yield Problem(("target_source", "model"), text)


def _reference(recipe: Recipe, at: KeyPath) -> Iterator[Problem]:
    from mergekit_lite.distillation.objectives.preference import OBJECTIVES

    if recipe.train.preference is None:
        yield Problem(at, "'reference' has no effect here: it is for 'train' with 'preference'")
        return
    name = recipe.train.preference.objective
    if name in OBJECTIVES and not OBJECTIVES[name].reference:
        yield Problem(at, f"'reference' has no effect here: {name} has none")
