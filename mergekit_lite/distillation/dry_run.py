"""What a distillation would do, without doing it: numbers of prompts, requests, rows and steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import ANSWER, Key, Prompt
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.assign import floor_share
from mergekit_lite.distillation.recipe.schema import TARGET, Recipe, RecipeSource, Training
from mergekit_lite.distillation.sample import key_of, missing_models, tasks_of


class DomainRows(NamedTuple):
    """Prompts of one domain, and the most rows that they can become: scores may drop some."""

    domain: str
    prompts: int
    rule: str
    sft: int
    preference: int


class SourceRequests(NamedTuple):
    """Requests to one source. For the target it is the most there can be, as its prompts are drawn later."""

    name: str
    model: str
    where: str
    requests: int
    done: int


class TrainingSteps(NamedTuple):
    """The most rows and optimiser steps of one training."""

    stage: str
    rows: int
    steps: int


class DryRun(NamedTuple):
    """All numbers of a dry run, and the models that are missing, as messages."""

    domains: tuple[DomainRows, ...]
    sources: tuple[SourceRequests, ...]
    scorers: tuple[str, ...]
    training: tuple[TrainingSteps, ...]
    missing_models: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        tables = {key: [row._asdict() for row in getattr(self, key)] for key in ("domains", "sources", "training")}
        return {**self._asdict(), **tables}


def dry_run(recipe: Recipe, prompts: Sequence[Prompt]) -> DryRun:
    """Count what the recipe would do with these prompts. Reads only the ledgers of earlier runs."""
    counts = Counter(prompt.domain for prompt in prompts)
    domains = tuple(_domain(recipe, domain, count) for domain, count in counts.items())
    sources = [_source(recipe, source, prompts) for source in recipe.sources]
    if recipe.target_source is not None:
        may_wait = (prompt for prompt in prompts if recipe.pairs.of(prompt.domain).needs_target)
        sources.append(_target(recipe, recipe.target_source, domains, may_wait))
    rows = {stage: sum(getattr(domain, stage) for domain in domains) for stage in recipe.train.stages}
    training = [_steps(stage, settings, rows[stage]) for stage, settings in recipe.train.stages.items()]
    scorers = tuple(scorer.name for scorer in recipe.scorers)
    return DryRun(domains, tuple(sources), scorers, tuple(training), tuple(missing_models(recipe, and_target=True)))


def _domain(recipe: Recipe, domain: str, count: int) -> DomainRows:
    pairing = recipe.pairs.of(domain)
    sft, preference = count, count  # with split availability either may get all
    if pairing.rule == "as_is":
        preference = 0
    elif pairing.split == "share":
        sft = floor_share(pairing.sft_share, count)
        preference = count - sft
    return DomainRows(domain, count, pairing.rule, sft, preference)


def _steps(stage: str, training: Training, rows: int) -> TrainingSteps:
    held = training.eval if training.eval >= 1 else math.floor(training.eval * rows + 1e-9)
    trained = max(0, rows - int(held))
    return TrainingSteps(stage, trained, math.floor(training.epochs * trained + 1e-9) // training.batch_size)


def _source(recipe: Recipe, source: RecipeSource, prompts: Iterable[Prompt]) -> SourceRequests:
    keys = [task.key for task in tasks_of(recipe, source, prompts)]
    missing: Sequence[Key] = Ledger(Folder(recipe.folder).samples(source.name), keys, key_of, ANSWER).missing
    where = source.server or "in this process"
    return SourceRequests(source.name, source.model, where, len(keys), len(keys) - len(missing))


def _target(
    recipe: Recipe, source: RecipeSource, domains: Iterable[DomainRows], prompts: Iterable[Prompt]
) -> SourceRequests:
    waiting = [rows for rows in domains if recipe.pairs.of(rows.domain).needs_target]
    requests = sum(rows.preference * source.answers_to(rows.domain) for rows in waiting)
    model = source.model if source.server else "what SFT makes" if recipe.train.sft else recipe.target
    return _source(recipe, source, prompts)._replace(name=TARGET, model=model, requests=requests)
