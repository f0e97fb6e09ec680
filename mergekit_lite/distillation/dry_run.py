"""What a distillation would do, without doing it: numbers of prompts, requests, rows and steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from mergekit_lite.answers.asking import urls_of
from mergekit_lite.answers.data_files import Data
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import ANSWER, Key, Prompt
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.distillation.data.given import Left, examples, given_answers
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.on_policy.rounds import planned
from mergekit_lite.distillation.pairing.assign import floor_share
from mergekit_lite.distillation.pairing.counts import counts_of
from mergekit_lite.distillation.recipe.fusing import pivots
from mergekit_lite.distillation.recipe.schema import (
    TARGET,
    Fuse,
    OnPolicy,
    Recipe,
    RecipeSource,
    RecipeTeacher,
    RoundRecipe,
    Training,
)
from mergekit_lite.distillation.rounds import all_rounds, is_done, prompts_of
from mergekit_lite.distillation.sample import key_of, missing_models, tasks_of
from mergekit_lite.distillation.teaching.encoding import Layout
from mergekit_lite.distillation.teaching.files import TaughtFile, is_taught
from mergekit_lite.errors import CheckpointError, counted

TOKENS, VOCABULARY = 400, 152_000  # of a response, and of a teacher, where costs are estimated
LOG_PROB = 14  # bytes of a token's log-probability in a file of text, about
REPLAYED: tuple[Literal["sft", "preference"], ...] = ("sft", "preference")
MADE_BY = {"sft": "SFT", "fuse": "fusing", "on_policy": "on-policy training"}


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


class TeacherRows(NamedTuple):
    """The most rows that one teacher scores, and about what that takes, at ``TOKENS`` tokens a response."""

    name: str
    model: str
    where: str
    rows: int
    done: int
    bytes: int  # of its files
    exaflops: float | None  # of its forward passes over the responses; None where its size isn't known here
    of: str = "rows"  # what it scores: SFT rows, or the student's own answers


class TrainingSteps(NamedTuple):
    """The most rows and optimiser steps of one training."""

    stage: str
    rows: int
    steps: int
    problem: str = ""  # why it will be refused: its rows fill no batch


class MostRows(NamedTuple):
    """The most rows that there can be, by domain."""

    domains: tuple[DomainRows, ...]  # of the prompts
    sft: Counter[str]
    preference: Counter[str]
    left_out: tuple[str, ...] = ()  # rows that are given and can't be read

    def asked(self, prompts: Sequence[Prompt]) -> Counter[str]:
        """Return the numbers of prompts of on-policy training, by domain: the recipe's, or those of given rows."""
        return Counter(prompt.domain for prompt in prompts) if prompts else self.sft + self.preference


class RoundPlan(NamedTuple):
    """The prompts of one round, and the most rows of earlier rounds and optimiser steps of all its trainings."""

    round: int
    prompts: int
    replayed: int
    steps: int
    done: bool


Row = TypeVar("Row", DomainRows, SourceRequests, TeacherRows)


class DryRun(NamedTuple):
    """All numbers of a dry run, and the models that are missing, as messages. With rounds they are those of all."""

    domains: tuple[DomainRows, ...]
    sources: tuple[SourceRequests, ...]
    scorers: tuple[str, ...]
    teachers: tuple[TeacherRows, ...]
    training: tuple[TrainingSteps, ...]
    missing_models: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # rows that are given and can't be read
    rounds: tuple[RoundPlan, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain data; only a training that will be refused has a ``problem``."""
        tables = {
            key: [row._asdict() for row in getattr(self, key)]
            for key in ("domains", "sources", "teachers", "training", "rounds")
        }
        tables["training"] = [
            {key: value for key, value in row.items() if key != "problem" or value} for row in tables["training"]
        ]
        return {**self._asdict(), **tables}


def dry_run(recipe: Recipe, prompts: Sequence[Prompt]) -> DryRun:
    """Count what the recipe would do with these prompts. Reads only the ledgers of earlier runs."""
    return _once(recipe, prompts, Counter()) if recipe.rounds is None else _over_rounds(recipe, prompts)


def unfilled(recipe: Recipe, prompts: Sequence[Prompt]) -> list[str]:
    """Return a message for each training whose rows can't fill a batch, however answers are scored.

    Opens no ledger. Trainings that are done are left out.
    """
    plans: Iterable[tuple[Recipe, Sequence[Prompt], Counter[str]]] = [(recipe, prompts, Counter())]
    if recipe.rounds is not None:
        plans = _by_round(recipe, prompts)
    return [
        f"round {each.number}: {training.problem}" if isinstance(each, RoundRecipe) else training.problem
        for each, mine, again in plans
        for training in _trainings(each, mine, _most_rows(each, mine), again)
        if training.problem and not (Folder(each.folder).trained(training.stage) / "config.json").exists()
    ]


def _by_round(recipe: Recipe, prompts: Sequence[Prompt]) -> Iterator[tuple[RoundRecipe, list[Prompt], Counter[str]]]:
    """Yield each round with its prompts, and the most rows of earlier rounds that it trains on again, by training."""
    own_rows: list[Counter[str]] = []  # the last round's first, by training
    for each in all_rounds(recipe):
        again: Counter[str] = Counter()
        for share, rows in zip(each.settings.replay, own_rows, strict=False):
            again.update({stage: floor_share(share, number) for stage, number in rows.items()})
        mine = prompts_of(each, prompts)
        yield each, mine, again
        domains = _most_rows(each, mine).domains
        own_rows.insert(0, Counter({name: sum(getattr(row, name) for row in domains) for name in REPLAYED}))


def _over_rounds(recipe: Recipe, prompts: Sequence[Prompt]) -> DryRun:
    """Return the sums over all rounds, each counted by itself, and what each of them has."""
    plans: list[DryRun] = []
    rounds: list[RoundPlan] = []
    for each, mine, again in _by_round(recipe, prompts):
        plan = _once(each, mine, again)
        plans.append(plan)
        steps = sum(training.steps for training in plan.training)
        rounds.append(RoundPlan(each.number, len(mine), again.total(), steps, is_done(each)))
    first, *later = plans
    reused = recipe.rounds is not None and recipe.rounds.prompts == "reuse"
    asked_once = [each.name for each in recipe.sources if reused]
    domains = _summed(row for plan in plans for row in plan.domains)
    sources = [*first.sources, *(row for plan in later for row in plan.sources if row.name not in asked_once)]
    training = tuple(
        row._replace(stage=f"round-{number} {row.stage}", problem=row.problem and f"round {number}: {row.problem}")
        for number, plan in enumerate(plans, 1)
        for row in plan.training
    )
    return first._replace(
        domains=domains,
        sources=_summed(sources),
        teachers=_summed(row for plan in plans for row in plan.teachers),
        training=training,
        rounds=tuple(rounds),
    )


def _summed(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Add up the numbers of rows of one name, of teachers of one kind too; the first of them has the other fields."""
    by_name: dict[tuple[str, str], Row] = {}
    for row in rows:
        name = row[0], getattr(row, "of", "")
        before = by_name.get(name)
        fields = {} if before is None else before._asdict()
        sums = {name: value + getattr(row, name) for name, value in fields.items() if isinstance(value, int | float)}
        by_name[name] = row if before is None else before._replace(**sums)
    return tuple(by_name.values())


def _once(recipe: Recipe, prompts: Sequence[Prompt], again: Counter[str]) -> DryRun:
    """Count what one distillation does, on rows of earlier rounds too: ``again``, by training."""
    most = _most_rows(recipe, prompts)
    sources = [_source(recipe, source, prompts) for source in recipe.sources]
    if recipe.target_source is not None:
        may_wait = (prompt for prompt in prompts if recipe.pairs.of(prompt.domain).needs_target)
        sources.append(_target(recipe, recipe.target_source, most.domains, may_wait))
    scorers = tuple(scorer.name for scorer in recipe.scorers)
    missing = tuple(missing_models(recipe, and_target=True))
    training = tuple(_trainings(recipe, prompts, most, again))
    teachers = tuple(_teachers(recipe, prompts, most))
    return DryRun(most.domains, tuple(sources), scorers, teachers, training, missing, most.left_out)


def _most_rows(recipe: Recipe, prompts: Sequence[Prompt]) -> MostRows:
    counts = Counter(prompt.domain for prompt in prompts)
    domains = tuple(_domain(recipe, domain, count) for domain, count in counts.items())
    if recipe.rows is None:
        sft, preference = (Counter({row.domain: getattr(row, name) for row in domains}) for name in REPLAYED)
        return MostRows(domains, sft, preference)
    left_out: list[str] = []
    sft, preference = (_given(getattr(recipe.rows, name), left_out) for name in REPLAYED)
    return MostRows(domains, sft, preference, tuple(left_out))


def _trainings(
    recipe: Recipe, prompts: Sequence[Prompt], most: MostRows, again: Counter[str]
) -> Iterator[TrainingSteps]:
    rows = {"sft": most.sft.total() + again["sft"], "preference": most.preference.total() + again["preference"]}
    for stage, settings in recipe.train.stages.items():
        if isinstance(settings, OnPolicy):
            plan = planned(settings, most.asked(prompts).total())
            yield TrainingSteps("on_policy", plan.rounds * plan.answers, plan.all_steps)
        elif isinstance(settings, Fuse):
            yield from _fusing(recipe, settings, most.sft, again["sft"])
        else:
            yield _steps(stage, settings, rows[stage])


def _teachers(recipe: Recipe, prompts: Sequence[Prompt], most: MostRows) -> Iterator[TeacherRows]:
    """Yield what each teacher scores: the SFT rows, and the student's own answers."""
    for teacher in recipe.teachers:
        if recipe.train.fuse is not None:
            yield _teacher(recipe, teacher, most.sft)
        if recipe.train.on_policy is not None:
            yield _scores_of_own(recipe.train.on_policy, teacher, most.asked(prompts))


def _given(origins: Iterable[Data], problems: list[str]) -> Counter[str]:
    """Return the numbers of rows by domain."""
    return Counter(example.prompt.domain for origin in origins for example, _ in examples(origin, problems))


def _teacher(recipe: Recipe, teacher: RecipeTeacher, by_domain: Mapping[str, int]) -> TeacherRows:
    rows = sum(number for domain, number in by_domain.items() if teacher.teaches(domain))
    folder = Folder(recipe.folder).taught(teacher.name)
    done = len(TaughtFile(folder)) if is_taught(folder) else 0
    layout = Layout.of(VOCABULARY, teacher.top)
    bits = layout.size + layout.id_bits + 32 + 4  # the token itself, its log-probability, the bytes of its text
    return _scoring(teacher, "rows", rows, min(done, rows), rows * TOKENS * bits // 8)


def _scores_of_own(training: OnPolicy, teacher: RecipeTeacher, asked: Mapping[str, int]) -> TeacherRows:
    """Return what a teacher scores of the student's own answers, of ``TOKENS`` tokens where they may be as long."""
    plan = planned(training, sum(asked.values()))
    taught = sum(number for domain, number in asked.items() if teacher.teaches(domain))
    rows = plan.rounds * min(plan.prompts, taught) * training.samples
    tokens = min(TOKENS, training.sampling.max_tokens)
    return _scoring(teacher, "own answers", rows, 0, rows * tokens * LOG_PROB, tokens)


def _scoring(teacher: RecipeTeacher, what: str, rows: int, done: int, size: int, tokens: int = TOKENS) -> TeacherRows:
    where = "in this process" if teacher.server is None else ", ".join(urls_of(teacher.server))
    weights = _parameters(teacher.model)
    exaflops = None if weights is None else rows * tokens * 2 * weights / 1e18
    return TeacherRows(teacher.name, teacher.model, where, rows, done, size, exaflops, what)


def _parameters(model: str) -> int | None:
    """Return the number of a model's weights, where it lies here."""
    if not Path(model).is_dir():
        return None
    try:
        return sum(spec.numel for spec in open_checkpoint(model).tensors.values())
    except CheckpointError:
        return None


def _domain(recipe: Recipe, domain: str, count: int) -> DomainRows:
    pairing = recipe.pairs.of(domain)
    sft, preference = count, count  # with split availability either may get all
    if not recipe.train.reads_rows:
        sft = preference = 0
    elif pairing.rule == "as_is":
        preference = 0
    elif pairing.split == "share":
        sft = floor_share(pairing.sft_share, count)
        preference = count - sft
    if pairing.sft_rows.top is not None:
        sft = min(sft, pairing.sft_rows.top)
    return DomainRows(domain, count, pairing.rule, sft, preference)


def _steps(stage: str, training: Training, rows: int) -> TrainingSteps:
    held = training.eval if training.eval >= 1 else math.floor(training.eval * rows + 1e-9)
    trained = max(0, rows - int(held))
    total = math.floor(training.epochs * trained + 1e-9)
    problem = ""
    if total < training.batch_size:
        most = counted(trained, "row")
        problem = (
            f"train.{stage}: {training.epochs:g} epochs of at most {most} don't fill a batch of {training.batch_size}. "
            + (
                f"Set batch_size to {total} at most."
                if total
                else "There are too few prompts for it, or none is for it."
            )
        )
    return TrainingSteps(stage, trained, total // training.batch_size, problem)


def _fusing(recipe: Recipe, fuse: Fuse, by_domain: Mapping[str, int], again: int) -> Iterator[TrainingSteps]:
    """Yield the training of the student, or with ``pairwise`` of each, on the rows that its teachers teach."""
    students = {"fuse": list(recipe.teachers)}
    if fuse.pairwise is not None:
        pivot = pivots(recipe)
        students = {f"fuse-{each.name}": [*pivot, each] for each in recipe.teachers if each not in pivot}
    for name, teachers in students.items():
        taught = [number for domain, number in by_domain.items() if any(each.teaches(domain) for each in teachers)]
        yield _steps(name, fuse, sum(taught) + again)


def _source(recipe: Recipe, source: RecipeSource, prompts: Iterable[Prompt]) -> SourceRequests:
    if source.answers:
        given = counts_of(each.answer.as_row() for each in given_answers(source, prompts, Left()))
        return SourceRequests(source.name, "", "given", given.answers, given.answers, given.cut)
    keys = [task.key for task in tasks_of(recipe, source, prompts)]
    ledger: Ledger[Key] = Ledger(Folder(recipe.folder).samples(source.name), keys, key_of, ANSWER)
    done, cut = len(keys) - len(ledger.missing), counts_of(ledger.rows()).cut
    model = source.model if source.aggregate is None else ", ".join(each.name for each in source.aggregate.models)
    return SourceRequests(source.name, model, source.where, len(keys), done, cut)


def _target(
    recipe: Recipe, source: RecipeSource, domains: Iterable[DomainRows], prompts: Iterable[Prompt]
) -> SourceRequests:
    waiting = [rows for rows in domains if recipe.pairs.of(rows.domain).needs_target]
    requests = sum(rows.preference * source.answers_to(rows.domain) for rows in waiting)
    before = recipe.train.before_preference
    made = recipe.target if before is None else f"what {MADE_BY[before]} makes"
    if recipe.rounds is not None and before is None:
        made = "what each round starts from"
    model = source.model if source.server else made
    return _source(recipe, source, prompts)._replace(name=TARGET, model=model, requests=requests)
