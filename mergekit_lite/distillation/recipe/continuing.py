"""What is wrong with sources that go on from another source's answers, or have them as drafts."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lite.answers.problems import KeyPath, Problem, not_named
from mergekit_lite.distillation.recipe.schema import Continues, Recipe, RecipeSource


def continuing_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what contradicts the ``continues`` and ``drafts`` of sources."""
    for number, source in enumerate(recipe.sources):
        if source.drafts is not None and source.aggregate is not None:
            yield from _others(recipe, ("sources", number), source, source.drafts, ("drafts",))
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
    yield from _others(recipe, at, source, continues.source, ("continues", "source"))


def _others(recipe: Recipe, at: KeyPath, source: RecipeSource, name: str, key: KeyPath) -> Iterator[Problem]:
    """Yield what is wrong with the other source, by its name, whose answers a source begins with."""
    others = {each.name: each for each in recipe.sources if each is not source}
    other = others.get(name)
    if other is None:
        yield Problem((*at, *key), not_named(name, list(others), "other source"))
        return
    if other.continues is not None or other.drafts is not None:
        before = other.drafts or (other.continues and other.continues.source)
        yield Problem(
            (*at, *key), f"{other.name!r} begins with another source's answers itself: name that one, {before!r}"
        )
    if other.domains is not None and (source.domains is None or not {*source.domains} <= {*other.domains}):
        text = (
            f"{other.name!r} answers only prompts of {', '.join(other.domains)}: give this source such 'domains', too"
        )
        yield Problem((*at, *key), text)
