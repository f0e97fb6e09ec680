"""What is wrong with the ``rounds`` of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lite.answers.problems import Problem
from mergekit_lite.distillation.recipe.fusing import pivots
from mergekit_lite.distillation.recipe.schema import Recipe, Rounds
from mergekit_lite.errors import counted

ROUND = "{round}"  # in the name that a server has for the target: the number of the round


def rounds_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what contradicts ``rounds``, and what has no effect with them, or without."""
    rounds, at = recipe.rounds, ("rounds",)
    if rounds is None:
        return
    if recipe.rows is not None:
        yield Problem(at, "with 'rows' that are given each round would train on the same: leave 'rounds' out")
    if len(rounds.replay) >= rounds.number:
        shares, before = counted(len(rounds.replay), "share"), counted(rounds.number - 1, "round")
        yield Problem((*at, "replay"), f"'replay' has {shares}, and the last round has {before} before it")
    if rounds.replay and not recipe.train.reads_rows:
        yield Problem((*at, "replay"), "'replay' has no effect here: no training reads rows")
    yield from _reference(recipe, rounds)
    if recipe.train.fuse is not None:
        for teacher in pivots(recipe):
            text = (
                f"the teacher {teacher.name} is the target, which is another model in each round: leave one of them out"
            )
            yield Problem(at, text)
    own = recipe.target_source
    if own is not None and own.server is not None and ROUND not in own.model:
        text = f"each round needs the model of the one before served: put {ROUND} into its 'model', or take 'serve'"
        yield Problem(("target_source", "model"), text)


def _reference(recipe: Recipe, rounds: Rounds) -> Iterator[Problem]:
    from mergekit_lite.distillation.objectives.preference import OBJECTIVES

    at, preference = ("rounds", "reference"), recipe.train.preference
    objective = OBJECTIVES.get(preference.objective) if preference is not None else None
    if rounds.reference == "first":
        if preference is None:
            yield Problem(at, "'reference' has no effect here: it is for 'train' with 'preference'")
        elif preference.reference is not None:
            yield Problem(at, "'train.preference' names a 'reference' already: give one of them")
        elif objective is not None and not objective.reference:
            yield Problem(at, f"'reference' has no effect here: {objective.name} has none")
    elif preference is not None and preference.reference is None and objective is not None and objective.rounds:
        text = f"{objective.name} is held to the first model and to the start of the round: say reference: first"
        yield Problem(("rounds",), text)
