"""What no single key of a recipe shows: names that nothing bears, and keys that don't go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mergekit_lite.answers.prompts import Prompts
from mergekit_lite.answers.scoring.registry import wrong_settings
from mergekit_lite.distillation import protocols
from mergekit_lite.distillation.recipe import TARGET, Recipe, Scorer, Source
from mergekit_lite.errors import UsageError, listing, nearest

TensorMerge = tuple[int | str, ...]


class Problem(NamedTuple):
    """What is wrong, and the way to it in the recipe."""

    at: TensorMerge
    text: str


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """All of them."""
    yield from _few(recipe)
    yield from _names("sources", [source.name for source in recipe.sources])
    yield from _names("scorers", [scorer.name for scorer in recipe.scorers])
    for number, source in enumerate(recipe.sources):
        yield from _source(("sources", number), source)
    for number, scorer in enumerate(recipe.scorers):
        yield from _scorer(("scorers", number), scorer)
    yield from _target_source(recipe)
    for way, prompts in _prompts(recipe):
        yield from _one_origin(way, prompts)
    yield from (Problem(way, text) for way, text in protocols.problems(recipe))
    for number, name in enumerate(recipe.report.scores or ()):
        yield from _known_scorer(recipe, ("report", "scores", number), name)


def unknown_domains(recipe: Recipe, domains: Iterable[str]) -> None:
    """Refuse a recipe that names a domain of which there is no prompt.

    Args:
        recipe: the recipe.
        domains: those of the prompts.

    Raises:
        UsageError: with all such names.
    """
    there = dict.fromkeys(domains)
    listed = ", ".join(repr(domain) for domain in there) or "none"
    problems = [
        f"{where}: no prompt is of the domain {name!r}.{nearest(name, there)}"
        for where, name in _named_domains(recipe)
        if name not in there
    ]
    if problems:
        raise UsageError(listing(f"The recipe names domains that no prompt has (there are: {listed})", problems))


def _few(recipe: Recipe) -> Iterator[Problem]:
    for key in ("prompts", "sources"):
        if not getattr(recipe, key):
            yield Problem((key,), f"{key!r} is an empty list: at least one is needed")
    if recipe.train.sft is None and recipe.train.preference is None:
        yield Problem(("train",), "'train' has neither 'sft' nor 'preference': at least one is needed")


def _known_scorer(recipe: Recipe, way: TensorMerge, name: str) -> Iterator[Problem]:
    known = [scorer.name for scorer in recipe.scorers]
    if name not in known:
        hint = nearest(name, known) or f" There are: {', '.join(known)}."
        yield Problem(way, f"no scorer is named {name!r}.{hint}")


def _names(key: str, names: Sequence[str]) -> Iterator[Problem]:
    for number, name in enumerate(names):
        at: TensorMerge = (key, number, "name")
        same = next((other for other in names[:number] if other.lower() == name.lower()), None)
        if same is not None:
            yield Problem(at, f"the name {name!r} is taken by another of the {key}: files are called by it")
        if name.lower().endswith(".partial"):
            yield Problem(at, f"the name {name!r} ends like a file that is not finished: choose another one")


def _source(way: TensorMerge, source: Source) -> Iterator[Problem]:
    if source.name == TARGET:
        yield Problem((*way, "name"), f"{TARGET!r} is the trained model's own name: choose another one")
    keys = ("batch_size", "device", "dtype") if source.server else ("concurrency", "timeout", "retries")
    why = "a server decides that itself" if source.server else "it is for a 'server'"
    for key in (*keys, *(() if source.server else ("api_key_variable",))):
        if key in source.model_fields_set:
            yield Problem((*way, key), f"{key!r} has no effect here: {why}")
    if source.domains is not None:
        for domain in source.samples_for:
            if domain not in source.domains:
                hint = nearest(domain, source.domains)
                text = f"samples for {domain!r}, which is not among the source's 'domains'.{hint}"
                yield Problem((*way, "samples_for", domain), text)


def _scorer(way: TensorMerge, scorer: Scorer) -> Iterator[Problem]:
    yield from (Problem((*way, *wrong.at), wrong.text) for wrong in wrong_settings(scorer))


def _target_source(recipe: Recipe) -> Iterator[Problem]:
    own = recipe.target_source
    if own is None:
        return
    if own.name != TARGET:
        yield Problem(("target_source", "name"), f"this source is always called {TARGET!r}: leave the name out")
    if own.server is None and own.model != TARGET:
        text = "the model of 'target_source' is the one that SFT makes, or else 'target': leave it out"
        yield Problem(("target_source", "model"), text)
    if own.server is not None and own.model == TARGET:
        yield Problem(("target_source",), "a 'server' needs the 'model', as it is called there")
    yield from (problem for problem in _source(("target_source",), own) if problem.at[-1] != "name")


def _prompts(recipe: Recipe) -> Iterator[tuple[TensorMerge, Prompts]]:
    for number, prompts in enumerate(recipe.prompts):
        yield ("prompts", number), prompts
    for number, prompts in enumerate(recipe.report.prompts):
        yield ("report", "prompts", number), prompts


def _one_origin(way: TensorMerge, prompts: Prompts) -> Iterator[Problem]:
    if (prompts.path is None) == (prompts.dataset is None):
        yield Problem(way, "prompts are given by exactly one of 'path' and 'dataset'")
    if prompts.path is not None:
        for key in ("config", "split"):
            if key in prompts.model_fields_set:
                yield Problem((*way, key), f"{key!r} has no effect on a file: it is for a 'dataset'")


def _named_domains(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for source in (*recipe.sources, *((recipe.target_source,) if recipe.target_source else ())):
        for domain in dict.fromkeys((*(source.domains or ()), *source.samples_for)):
            yield f"the source {source.name}", domain
    for scorer in recipe.scorers:
        for domain in scorer.domains or ():
            yield f"the scorer {scorer.name}", domain
    for domain in recipe.pairs.domains:
        yield "pairs.domains", domain
