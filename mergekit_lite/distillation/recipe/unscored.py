"""What is wrong with rules that pair answers as they were asked for, and with the system messages that prompts get."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lite.answers.problems import KeyPath, Problem, not_named
from mergekit_lite.distillation.recipe.choosing import Systems
from mergekit_lite.distillation.recipe.schema import UNSCORED, Pairing, Recipe


def wrong_systems(at: KeyPath, systems: Systems | None) -> Iterator[Problem]:
    """Yield what is wrong with ``systems`` of a source of prompts."""
    if systems is None:
        return
    if bool(systems.texts) == (systems.column is not None):
        yield Problem(at, "system messages are given by exactly one of 'texts' and 'column'")
    elif systems.texts and len(systems.texts) < systems.each:
        yield Problem((*at, "each"), f"{systems.each} of {len(systems.texts)} 'texts' can't be had")
    for place, text in enumerate(systems.texts):
        if text in systems.texts[:place]:
            yield Problem((*at, "texts", place), "this text is listed twice")


def wrong_unscored(recipe: Recipe, pairing: Pairing, at: KeyPath) -> Iterator[Problem]:
    """Yield what contradicts the rules ``crossed`` and ``asked``."""
    names = [source.name for source in recipe.sources]
    for key in ("chosen", "rejected"):
        name = getattr(pairing, key)
        if name is not None and pairing.rule != "asked":
            yield Problem((*at, key), f"{key!r} has no effect here: it is for the rule 'asked'")
        elif name is None and pairing.rule == "asked":
            yield Problem(at, f"asked pairs the answers of two sources: name the one of the {key} as '{key}'")
        elif name is not None and name not in names:
            yield Problem((*at, key), not_named(name, names, "source"))
    if pairing.rule == "asked" and pairing.chosen is not None and pairing.chosen == pairing.rejected:
        yield Problem((*at, "rejected"), f"{pairing.rejected!r} can't be chosen and rejected")
    if pairing.rule == "crossed" and not any(prompts.systems for prompts in recipe.prompts):
        yield Problem(at, "crossed pairs answers under different system messages: give some prompts 'systems'")
    if pairing.rule not in UNSCORED or pairing.rule == "as_is":
        return
    gaps = {"gap": pairing.gap != (None, None), "gap_quantiles": pairing.gap_quantiles, "gap_own": pairing.gap_own}
    bounds = {**gaps, "rip": pairing.rip.thresholds and pairing.rip.of == "pairs"}
    for key in (key for key, given in bounds.items() if given):
        if pairing.rule == "crossed":
            yield Problem((*at, key), f"{key!r} compares scores, and those under two system messages can't be compared")
        elif pairing.score is None:
            yield Problem((*at, key), f"{key!r} compares scores: name the scorer as 'score'")
    if pairing.score is None and pairing.chosen_score is not None:
        yield Problem((*at, "chosen_score"), "'chosen_score' looks at scores: name the scorer as 'score'")
