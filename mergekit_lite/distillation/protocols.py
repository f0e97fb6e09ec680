"""What can be wrong with the recipe's pairs, found before anything is read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

from mergekit_lite.distillation.assign import TARGET_RULES, needs_target
from mergekit_lite.distillation.recipe import Pairs, Recipe
from mergekit_lite.distillation.rules import RULES
from mergekit_lite.errors import nearest

TensorMerge = tuple[int | str, ...]  # keys from the recipe's root
DRAWN = ("answers", "draw")  # parameters of rules that no recipe gives


def problems(recipe: Recipe, domains: Iterable[str] = ()) -> Iterator[tuple[TensorMerge, str]]:
    """All of them, each with the way to the key that is wrong.

    Args:
        recipe: the recipe.
        domains: of the prompts, where they are known; those that the recipe names are always looked at.
    """
    yield from _of_protocol(recipe, recipe.pairs.of(""), ("pairs",))
    for domain in dict.fromkeys([*recipe.pairs.domains, *domains]):
        pairs = recipe.pairs.of(domain)
        way: TensorMerge = ("pairs", "domains", domain) if domain in recipe.pairs.domains else ("pairs",)
        if len(way) > 1:
            yield from _of_protocol(recipe, pairs, way)
        judged = {scorer.name: scorer.domains for scorer in recipe.scorers}
        for name in pairs.scorers:
            of = judged.get(name)
            if of is not None and domain not in of:
                yield way, f"the scorer {name!r} doesn't judge the domain {domain!r}: add it to the scorer's domains"


def _of_protocol(recipe: Recipe, pairs: Pairs, way: TensorMerge) -> Iterator[tuple[TensorMerge, str]]:
    scorers = [scorer.name for scorer in recipe.scorers]
    for key, name in (("score", pairs.score), ("correct", pairs.correct)):
        if name is not None and name not in scorers:
            known = f" Known: {', '.join(scorers)}." if scorers else " The recipe has no scorers."
            yield (*way, key), f"no scorer is named {name!r}.{nearest(name, scorers)}{known}"
    if pairs.rule != "as_is":
        if pairs.score is None:
            yield way, f"{pairs.rule} ranks answers: name the scorer as `score`"
        yield from _options(pairs, way)
    if pairs.gap != (None, None) and pairs.gap_quantiles is not None:
        yield (*way, "gap_quantiles"), "gap and gap_quantiles are two ways to say the same: give one"
    for key, bounds in (("gap", pairs.gap), ("gap_quantiles", pairs.gap_quantiles or (None, None))):
        least, most = bounds
        if least is not None and most is not None and least > most:
            yield (*way, key), f"the least is {least:g}, more than the most, {most:g}"
    if needs_target(pairs):
        if recipe.target_source is None:
            yield way, f"{pairs.rule} needs the target's own answers: say in `target_source` how it gives them"
        if pairs.split == "availability":
            yield (*way, "split"), "the target answers after its SFT, so the split can't wait for its pairs: use share"
    if pairs.answers != "sources" and pairs.rule in ("fusechat3", *TARGET_RULES):
        yield (*way, "answers"), f"{pairs.rule} says itself whose answers it pairs: leave it out"


def _options(pairs: Pairs, way: TensorMerge) -> Iterator[tuple[TensorMerge, str]]:
    known = [name for name in inspect.signature(RULES[pairs.rule]).parameters if name not in DRAWN]
    for name in pairs.options:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            yield (*way, "options", name), f"{pairs.rule} has no option {name!r}, {takes}.{nearest(name, known)}"
