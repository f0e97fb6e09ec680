"""What a distillation would do, without doing it: numbers of prompts, requests, rows and steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mergekit_lite.answers.asking import urls_of
from mergekit_lite.answers.data_files import Data
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import ANSWER, Key, Prompt
from mergekit_lite.distillation.data.given import Left, examples, given_answers
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.assign import floor_share
from mergekit_lite.distillation.pairing.counts import counts_of
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
    cut: int = 0  # of those that are done, by the limit of tokens


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
    left_out: tuple[str, ...] = ()  # rows that are given and can't be read

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
    left_out: list[str] = []
    if recipe.rows is not None:
        rows = {stage: _given(getattr(recipe.rows, stage), left_out) for stage in recipe.train.stages}
    training = [_steps(stage, settings, rows[stage]) for stage, settings in recipe.train.stages.items()]
    scorers = tuple(scorer.name for scorer in recipe.scorers)
    missing = tuple(missing_models(recipe, and_target=True))
    return DryRun(domains, tuple(sources), scorers, tuple(training), missing, tuple(left_out))


def _given(origins: Iterable[Data], problems: list[str]) -> int:
    return sum(1 for origin in origins for _ in examples(origin, problems))


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
    if source.answers:
        given = counts_of(each.answer.as_row() for each in given_answers(source, prompts, Left()))
        return SourceRequests(source.name, "", "given", given.answers, given.answers, given.cut)
    keys = [task.key for task in tasks_of(recipe, source, prompts)]
    ledger: Ledger[Key] = Ledger(Folder(recipe.folder).samples(source.name), keys, key_of, ANSWER)
    where = "in this process" if source.engine == "transformers" else f"in this process, by {source.engine}"
    if source.server is not None:
        where = ", ".join(urls_of(source.server))
    elif source.serve is not None:
        where = f"served by {source.serve}"
    done, cut = len(keys) - len(ledger.missing), counts_of(ledger.rows()).cut
    return SourceRequests(source.name, source.model, where, len(keys), done, cut)


def _target(
    recipe: Recipe, source: RecipeSource, domains: Iterable[DomainRows], prompts: Iterable[Prompt]
) -> SourceRequests:
    waiting = [rows for rows in domains if recipe.pairs.of(rows.domain).needs_target]
    requests = sum(rows.preference * source.answers_to(rows.domain) for rows in waiting)
    model = source.model if source.server else "what SFT makes" if recipe.train.sft else recipe.target
    return _source(recipe, source, prompts)._replace(name=TARGET, model=model, requests=requests)
