"""Rounds: the distillation again and again, each time from the model that the last time made.

    target ─▶ round-1/ ─▶ round-2/ ─▶ …        round-K/ has all that a distillation's folder has

A round is a recipe of its own (``RoundRecipe``), on which the stages work as on any other: its folder is ``round-K/``,
its target is what the round before made. So a kill loses what the stages lose, and the same command goes on.

With ``momentum`` a round ends with a step beyond what it has trained, θ̂_K, to ``round-K/momentum/`` (APO, He et al.
2024, arXiv 2410.06293):

    θ_K = θ̂_K + momentum · (θ̂_K − θ̂_{K−1})        θ̂_0 = the first model

The paper has it for distributions, π_K ∝ π̂_K (π̂_K / π̂_{K−1})^momentum. That it is done so on the weights is taken from
summaries of the paper, and was not found in it or in code of its authors.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite.answers.rows import Prompt, seed_of
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.rounds import ROUND
from mergekit_lite.distillation.recipe.schema import Recipe, RecipeSource, RoundRecipe, Train
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.settings import hold_settings
from mergekit_lite.distillation.training.workspace import identity
from mergekit_lite.errors import UsageError, counted
from mergekit_lite.extrapolation import extrapolate


def each_round(recipe: Recipe, reporter: Reporter) -> Iterator[Recipe]:
    """Yield the recipe of each round, to be done before the next one; without rounds the recipe itself."""
    if recipe.rounds is None:
        yield recipe
        return
    for each in all_rounds(recipe):
        reporter.line(f"[round {each.number} of {recipe.rounds.number}: {each.folder}]")
        yield each


def current(recipe: Recipe, reporter: Reporter) -> Recipe:
    """Return the recipe of the first round that is not done, or of the last; without rounds the recipe itself."""
    if recipe.rounds is None:
        return recipe
    every = all_rounds(recipe)
    at_work = next((each for each in every if not is_done(each)), every[-1])
    reporter.line(f"[round {at_work.number} of {len(every)}: {at_work.folder}]")
    return at_work


def all_rounds(recipe: Recipe) -> list[RoundRecipe]:
    """Return the recipes of all rounds; none without rounds."""
    return [round_of(recipe, number) for number in range(1, recipe.rounds.number + 1)] if recipe.rounds else []


def round_of(recipe: Recipe, number: int) -> RoundRecipe:
    """Return the recipe of a round, by its number from 1. What the target says is drawn with another seed each time."""
    start = recipe.target if number == 1 else str(made_by(round_of(recipe, number - 1)))
    changes: dict[str, Any] = {
        "folder": recipe.folder / f"round-{number}",
        "target": start,
        "train": _train(recipe, number),
        "target_source": recipe.target_source and _own(recipe, recipe.target_source, number),
    }
    given = {name: getattr(recipe, name) for name in recipe.model_fields_set}
    return RoundRecipe.model_validate({**given, **changes, "whole": recipe, "number": number})


def _train(recipe: Recipe, number: int) -> Train:
    """Return the trainings of a round, with the first model as reference where it is that, and isn't the start."""
    preference, rounds = recipe.train.preference, recipe.rounds
    is_start = number == 1 and recipe.train.before_preference is None
    if preference is None or rounds is None or rounds.reference == "start" or is_start:
        return recipe.train
    return recipe.train.model_copy(update={"preference": preference.model_copy(update={"reference": recipe.target})})


def _own(recipe: Recipe, source: RecipeSource, number: int) -> RecipeSource:
    seed = recipe.seed if source.seed is None else source.seed
    changes = {"model": source.model.replace(ROUND, str(number))} if source.server is not None else {}
    return source.model_copy(update={**changes, "seed": seed if number == 1 else seed_of(seed, "round", number)})


def trained_in(recipe: RoundRecipe) -> Path:
    """Return the folder of the model that the last training of a round makes."""
    return Folder(recipe.folder).trained(list(recipe.train.stages)[-1])


def made_by(recipe: RoundRecipe) -> Path:
    """Return the folder of the model that a round ends with."""
    return Folder(recipe.folder).momentum if recipe.settings.momentum else trained_in(recipe)


def is_done(recipe: RoundRecipe) -> bool:
    """Whether the model that a round ends with is there."""
    return (made_by(recipe) / "config.json").exists()


def prompts_of(recipe: RoundRecipe, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return a round's prompts of all: with ``split`` its part, of each domain as many as another round's, or one less.

    Which part a prompt is in depends on the seed and on the ids and domains of all, not on their order. A question that
    is asked under several system messages is in one part.

    Raises:
        UsageError: there are fewer prompts than rounds.
    """
    rounds = recipe.settings
    if rounds.prompts == "reuse":
        return list(prompts)
    asked = {prompt.question or prompt.id: prompt.domain for prompt in prompts}
    if len(asked) < rounds.number:
        parts = f"{counted(len(asked), 'prompt')} can't be split between {rounds.number:,} rounds"
        raise UsageError(f"{parts}. Take fewer rounds, or all prompts in each: rounds: {{prompts: reuse}}.")
    ranked = sorted(asked, key=lambda question: (asked[question], seed_of(recipe.seed, "rounds", question), question))
    part = {*ranked[recipe.number - 1 :: rounds.number]}
    return [prompt for prompt in prompts if (prompt.question or prompt.id) in part]


def hold_parts(recipe: Recipe) -> None:
    """Save into how many parts the prompts are split. Raises UsageError where rounds have answers to other parts."""
    assert recipe.rounds is not None
    parts = recipe.rounds.number if recipe.rounds.prompts == "split" else 1
    settings = {"parts": parts, "seed": recipe.seed if parts > 1 else None}
    refusal = f"The rounds in {recipe.folder} have other parts of the prompts"
    advice = "Set it back; or let the recipe name another `folder`, and start from the model that is there."
    has_answers = Folder(recipe.folder).has_answers
    hold_settings(recipe.folder / "rounds.json", settings, "rounds", refusal if has_answers else None, advice)


def take_over(recipe: Recipe) -> None:
    """Give a round that asks all prompts again what sources said in the first one, with its scores.

    So nobody is asked twice. Files that are there already stay. Does nothing for other recipes.
    """
    if not isinstance(recipe, RoundRecipe) or recipe.number == 1 or recipe.settings.prompts == "split":
        return
    then, now = Folder(round_of(recipe.whole, 1).folder), Folder(recipe.folder)
    for source in (source.name for source in recipe.sources if not source.answers):
        scores = [then.scores(scorer.name, source) for scorer in recipe.scorers]
        settings = [then.samples(source).with_suffix(".json")]
        settings += [path.parent.with_name(f"{path.parent.name}.json") for path in scores]
        for path in (*settings, *scores, then.samples(source)):  # rows without settings would pass for those of today's
            _copy(path, now.root / path.relative_to(then.root))


def _copy(origin: Path, copy: Path) -> None:
    if copy.exists() or not origin.exists():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    unfinished = copy.with_name(f"{copy.name}.copy")
    shutil.copyfile(origin, unfinished)
    unfinished.replace(copy)


def add_momentum(recipe: RoundRecipe, reporter: Reporter) -> None:
    """Take the step beyond a round's trained model, unless it is taken already.

    Weights are rounded up or down by chance, as a step of training is often smaller than the spacing of 16 bits.

    Raises:
        UsageError: the step that is there, or one of a round before, was taken with another momentum, or between other
            models.
        CheckpointError, PlanError, RunError, NonFiniteError: as ``extrapolate`` does.
    """
    for number in range(1, recipe.number + 1):
        _hold_step(round_of(recipe.whole, number))
    folder, momentum, before = Folder(recipe.folder).momentum, recipe.settings.momentum, _before(recipe)
    if not folder.exists():
        trained = str(trained_in(recipe))
        extrapolate(before, trained, str(folder), momentum, rounding="stochastic", seed=recipe.seed, resume=True)
    reporter.line(f"momentum: {momentum:g} × the step from {before} is added, {folder}")


def _before(recipe: RoundRecipe) -> str:
    """Return the model that a round's step comes from: what the round before has trained, or the first model."""
    return recipe.whole.target if recipe.number == 1 else str(trained_in(round_of(recipe.whole, recipe.number - 1)))


def _hold_step(recipe: RoundRecipe) -> None:
    """Save how a round's step is taken. Raises UsageError where it was taken otherwise."""
    folder = Folder(recipe.folder).momentum
    settings = {
        "momentum": recipe.settings.momentum,
        "seed": recipe.seed,
        "weights before": identity(_before(recipe)),
        "weights trained": identity(str(trained_in(recipe))),
    }
    there = [path for path in (folder, folder.with_name(f".{folder.name}.partial")) if path.exists()]
    refusal = f"The step in {folder} was taken in another way" if there else None
    advice = f"Set the recipe back; or delete {' and '.join(map(str, there))}, and the rounds after, to take it anew."
    hold_settings(folder.with_name(f"{folder.name}.json"), settings, "step", refusal, advice)
