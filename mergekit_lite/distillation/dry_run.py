"""What a distillation will do, before it does anything: prompts, requests, rows, steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import Key, Prompt
from mergekit_lite.distillation.assign import needs_target, whole
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe import TARGET, Recipe, Source, Training
from mergekit_lite.distillation.sample import key_of, missing_models, tasks_of


class OfDomain(NamedTuple):
    """Prompts of one domain, and the rows they become at most: what scores drop can't be known before."""

    domain: str
    prompts: int
    rule: str
    sft: int
    preference: int


class OfSource(NamedTuple):
    """What one source is asked. The number is the most that it can be for the target, whose prompts are drawn later."""

    name: str
    model: str
    where: str
    requests: int
    done: int


class OfStage(NamedTuple):
    """One stage of training; rows and steps are the most that they can be."""

    stage: str
    rows: int
    steps: int


class Outlook(NamedTuple):
    """The whole plan."""

    domains: tuple[OfDomain, ...]
    sources: tuple[OfSource, ...]
    scorers: tuple[str, ...]
    training: tuple[OfStage, ...]
    missing_models: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "domains": [domain._asdict() for domain in self.domains],
            "sources": [source._asdict() for source in self.sources],
            "scorers": list(self.scorers),
            "training": [stage._asdict() for stage in self.training],
            "missing_models": list(self.missing_models),
        }


def outlook(recipe: Recipe, prompts: Sequence[Prompt]) -> Outlook:
    """What the recipe does with these prompts. Reads only what earlier runs have done."""
    counts = Counter(prompt.domain for prompt in prompts)
    domains = tuple(_domain(recipe, domain, count) for domain, count in counts.items())
    sources = [_source(recipe, source, prompts) for source in recipe.sources]
    if recipe.target_source is not None:
        waiting = (prompt for prompt in prompts if needs_target(recipe.pairs.of(prompt.domain)))
        sources.append(_target(recipe, recipe.target_source, domains, waiting))
    training = [
        _stage(stage, how, sum(getattr(domain, stage) for domain in domains))
        for stage, how in (("sft", recipe.train.sft), ("preference", recipe.train.preference))
        if how is not None
    ]
    scorers = tuple(scorer.name for scorer in recipe.scorers)
    return Outlook(domains, tuple(sources), scorers, tuple(training), tuple(missing_models(recipe, and_target=True)))


def _domain(recipe: Recipe, domain: str, count: int) -> OfDomain:
    pairs = recipe.pairs.of(domain)
    sft, preference = count, count  # at most, where it goes by what is available
    if pairs.rule == "as_is":
        preference = 0
    elif pairs.split == "share":
        sft = whole(pairs.sft_share, count)
        preference = count - sft
    return OfDomain(domain, count, pairs.rule, sft, preference)


def _source(recipe: Recipe, source: Source, prompts: Iterable[Prompt]) -> OfSource:
    keys = [task.key for task in tasks_of(recipe, source, prompts)]
    missing: Sequence[Key] = Ledger(Folder(recipe.folder).samples(source.name), keys, key_of).missing
    return OfSource(source.name, source.model, _where(source), len(keys), len(keys) - len(missing))


def _target(recipe: Recipe, source: Source, domains: Iterable[OfDomain], prompts: Iterable[Prompt]) -> OfSource:
    whole = _source(recipe, source, prompts)
    requests = sum(
        own.preference * source.samples_for.get(own.domain, source.samples)
        for own in domains
        if needs_target(recipe.pairs.of(own.domain)) and (source.domains is None or own.domain in source.domains)
    )
    model = source.model if source.server else "what SFT makes" if recipe.train.sft else recipe.target
    return whole._replace(name=TARGET, model=model, requests=requests)


def _where(source: Source) -> str:
    return source.server or "in this process"


def _stage(stage: str, how: Training, rows: int) -> OfStage:
    return OfStage(stage, rows, math.floor(how.epochs * rows + 1e-9) // how.batch_size)
