"""What is wrong with sources that go on from another source's answers."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lite.answers.problems import KeyPath, Problem, not_named
from mergekit_lite.distillation.recipe.schema import Continues, Recipe, RecipeSource


def continuing_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what contradicts the ``continues`` of sources."""
    for number, source in enumerate(recipe.sources):
        if source.continues is not None:
            yield from _problems(recipe, ("sources", number), source, source.continues)
    own = recipe.target_source
    if own is not None and own.continues is not None:
        yield from _problems(recipe, ("target_source",), own, own.continues)


def _problems(recipe: Recipe, at: KeyPath, source: RecipeSource, continues: Continues) -> Iterator[Problem]:
    if source.answers or source.aggregate is not None:
        return  # it has no effect, which is told already
    for key in ("one_request", "in_context"):
        if getattr(source, key):
            yield Problem((*at, key), f"{key!r} and 'continues' don't go together: each answer has its own beginning")
    others = {each.name: each for each in recipe.sources if each is not source}
    other = others.get(continues.source)
    if other is None:
        yield Problem((*at, "continues", "source"), not_named(continues.source, list(others), "other source"))
        return
    if other.continues is not None:
        text = f"{other.name!r} goes on from another source's answers itself: name that one, {other.continues.source!r}"
        yield Problem((*at, "continues", "source"), text)
    if other.domains is not None and (source.domains is None or not {*source.domains} <= {*other.domains}):
        text = (
            f"{other.name!r} answers only prompts of {', '.join(other.domains)}: give this source such 'domains', too"
        )
        yield Problem((*at, "continues", "source"), text)
