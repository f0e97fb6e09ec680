"""The sample stage: prompts × sources × samples, as ledgers of answers.

Sources behind servers are asked concurrently, those in this process one after the other. ``samples/SOURCE.json`` holds
the settings of a source's answers, so that answers drawn with different settings are never in one file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.rows import ANSWER, Answer, Key, Prompt, read_rows, seed_of
from mergekit_lite.answers.server import Served, Server, answers_of
from mergekit_lite.distillation.data.importing import import_answers
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.counts import counts_of
from mergekit_lite.distillation.prompts import settled
from mergekit_lite.distillation.recipe.schema import TARGET, Recipe, RecipeSource
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.settings import hold_settings
from mergekit_lite.errors import RunError, UsageError, counted, listing

SHOWN = 3  # reasons of missing answers in a message


@dataclass(frozen=True)
class SourceTasks:
    """A source, all answers it has to give, and the ledger of those it gave."""

    source: RecipeSource
    tasks: tuple[Task, ...]
    ledger: Ledger[Key]


def sample(recipe: Recipe, reporter: Reporter, *, skip_missing: bool = False) -> None:
    """Ask every source for the answers it has not given yet; the trained target too, once it exists.

    Args:
        recipe: the recipe.
        reporter: takes progress and results.
        skip_missing: finish without the answers that sources fail to give.

    Raises:
        UsageError: the prompts or a source's settings are not those of the existing answers.
        RunError: answers are missing at the end.
    """
    if recipe.rows is not None:
        reporter.line("The rows are given: nothing is asked.")
        return
    check(recipe)
    prompts = settled(recipe, reporter)
    for source in (source for source in recipe.sources if source.answers):
        number = import_answers(Folder(recipe.folder), source, prompts, reporter)
        reporter.line(f"{source.name}: {counted(number, 'answer')} given")
    planned = plan(recipe, prompts)
    for each in planned:
        _hold_settings(recipe, each.source)
    unfinished = [each for each in planned if each.ledger.missing]
    behind_servers = [each for each in unfinished if each.source.server]
    missing: list[str] = []
    for group in (behind_servers, *([each] for each in unfinished if not each.source.server)):
        missing += _ask(recipe, group, reporter)
    if missing and not skip_missing:
        raise RunError(
            listing("Answers are missing; all others are kept", missing) + "\nThe same command goes on and asks for "
            "what is missing. With --skip-missing the stage ends without it."
        )
    for each in planned:
        answers = len(each.tasks) - len(each.ledger.missing)
        each.ledger.finish(with_missing=skip_missing)
        ends = counts_of(each.ledger.rows()).remark
        reporter.line(f"{each.source.name}: {counted(answers, 'answer')} in {each.ledger.path}{ends}")
    if (why := waits_for(recipe)) is not None:
        reporter.line(f"{TARGET}: answers later: {why}")


def check(recipe: Recipe, *, and_target: bool = False) -> None:
    """Raise UsageError with all missing models of a recipe, as far as they still have to answer.

    The target may be on another machine while sources are asked: it is checked only with ``and_target``.
    """
    if missing := missing_models(recipe, and_target=and_target):
        raise UsageError(listing("Models are missing", missing))


def missing_models(recipe: Recipe, *, and_target: bool) -> list[str]:
    """Return the local models that are still needed and have no folder, as messages."""
    folder = Folder(recipe.folder)
    local = [source for source in recipe.sources if source.server is None and not source.answers]
    models = {f"the source {each.name}": each.model for each in local if not folder.samples(each.name).exists()}
    if and_target:
        models["the target"] = recipe.target
    absent = {whose: model for whose, model in models.items() if Path(model).is_absolute() and not Path(model).is_dir()}
    return [f"{whose}: {model} is no folder" for whose, model in absent.items()]


def plan(recipe: Recipe, prompts: Sequence[Prompt]) -> list[SourceTasks]:
    """Return the tasks of every source that is asked, and those of the target where it can answer already."""
    planned = [_source_tasks(recipe, source, prompts) for source in recipe.sources if not source.answers]
    if recipe.target_source is not None and waits_for(recipe) is None:
        planned.append(_source_tasks(recipe, recipe.target_source, own_prompts(recipe, prompts)))
    return planned


def waits_for(recipe: Recipe) -> str | None:
    """Return why the target can't answer for itself yet; None where it can, or has nothing to answer."""
    folder = Folder(recipe.folder)
    if recipe.target_source is None:
        return None
    if not folder.pairs(TARGET).exists():
        return f"{folder.pairs(TARGET)} will tell what it is asked: the stage `pair` writes it"
    if recipe.train.sft is not None and not (folder.trained("sft") / "config.json").exists():
        return f"the stage `train` makes {folder.trained('sft')} first"
    return None


def own_prompts(recipe: Recipe, prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts that the target is asked: those whose pairs wait for its own answers."""
    waiting = {line.row.get("prompt") for line in read_rows(Folder(recipe.folder).pairs(TARGET), [])}
    return [prompt for prompt in prompts if prompt.id in waiting]


def tasks_of(recipe: Recipe, source: RecipeSource, prompts: Iterable[Prompt]) -> tuple[Task, ...]:
    """Return a source's tasks: its number of answers to each prompt of its domains, each with a seed of its own."""
    return tuple(
        Task(prompt, index, seed_of(recipe.seed, source.name, prompt.id, index))
        for prompt in prompts
        for index in range(source.answers_to(prompt.domain))
    )


def respondent(recipe: Recipe, source: RecipeSource) -> Served | Local:
    """Return what answers for a source: a client of its server, or the model in this process."""
    if source.server is not None:
        server = Server(
            source.server,
            source.model,
            source.sampling,
            source.api_key_variable,
            source.concurrency,
            source.timeout,
            source.retries,
        )
        return Served(source.name, server, source.system)
    return Local(
        source.name,
        _model(recipe, source),
        source.sampling,
        system=source.system,
        batch_size=source.batch_size,
        device=source.device,
        dtype=source.dtype,
    )


def key_of(row: dict[str, Any]) -> Key:
    """Return the key of an answer's row."""
    return Key(row["prompt"], row["index"])


def _source_tasks(recipe: Recipe, source: RecipeSource, prompts: Iterable[Prompt]) -> SourceTasks:
    tasks = tasks_of(recipe, source, prompts)
    path = Folder(recipe.folder).samples(source.name)
    return SourceTasks(source, tasks, Ledger(path, [task.key for task in tasks], key_of, ANSWER))


def _ask(recipe: Recipe, group: Sequence[SourceTasks], reporter: Reporter) -> list[str]:
    """Ask one local source, or all servers. Returns a message for each source that answers are missing of."""
    ledgers = {each.source.name: each.ledger for each in group}
    respondents = {each.source.name: respondent(recipe, each.source) for each in group}
    advance: dict[str, Callable[[int], None]] = {}
    with ExitStack() as stack:
        for each in group:
            name, total = each.source.name, len(each.tasks)
            advance[name] = stack.enter_context(reporter.progress(name, total, total - len(each.ledger.missing)))
            stack.callback(each.ledger.close)
        with closing(_answers([(respondents[each.source.name], each) for each in group])) as answers:
            for answer in answers:
                ledgers[answer.source].append([answer.as_row()])
                advance[answer.source](1)
    return [line for each in group for line in _failures(recipe, each, respondents[each.source.name], reporter)]


def _answers(group: Sequence[tuple[Served | Local, SourceTasks]]) -> Generator[Answer]:
    wanted = [(who, each.tasks, frozenset(each.ledger.missing)) for who, each in group]
    for who, tasks, missing in wanted:
        if isinstance(who, Local):
            yield from who.answers(tasks, missing)
    yield from answers_of([(who, tasks, missing) for who, tasks, missing in wanted if isinstance(who, Served)])


def _failures(recipe: Recipe, asked: SourceTasks, who: Served | Local, reporter: Reporter) -> Iterator[str]:
    source, failures = asked.source, who.failures
    for note in who.template.notes if isinstance(who, Local) else ():
        reporter.line(f"{source.name}: {note}")
    if failures.retried:
        reasons = ", ".join(f"{why} {count:,}×" for why, count in failures.retried.most_common())
        reporter.line(f"{source.name}: {counted(failures.retried.total(), 'request')} made again: {reasons}")
    if missing := len(asked.ledger.missing):
        message = f"{source.name}: {missing:,} of {len(asked.tasks):,}. {failures.stopped or _reasons(failures.lost)}"
        if source.name == TARGET and source.server is not None:
            message += f" The server {source.server} has to serve {_trained(recipe)} as {source.model}."
        yield message


def _reasons(lost: dict[Key, str]) -> str:
    example = {why: key.prompt for key, why in lost.items()}
    counts = Counter(lost.values()).most_common()
    shown = [f"{why} ({count:,}×, for instance the prompt {example[why]})" for why, count in counts[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(counts) - SHOWN:,} other reasons" if len(counts) > SHOWN else "")


def _hold_settings(recipe: Recipe, source: RecipeSource) -> None:
    path = Folder(recipe.folder).samples(source.name).with_suffix(".json")
    exists = any(path.with_name(f"{source.name}{end}").exists() for end in (".jsonl", ".partial.jsonl"))
    refusal = f"The answers of {source.name} in {path.parent} were drawn in another way"
    advice = (
        f"Set it back; or, to ask again, delete {source.name}.* there, and what was made of these answers: "
        f"scores/*/{source.name}.*, pairs and train."
    )
    hold_settings(path, _settings(recipe, source), "answers", refusal if exists else None, advice)


def _settings(recipe: Recipe, source: RecipeSource) -> dict[str, Any]:
    model = _model(recipe, source)
    return {
        "model": os.path.relpath(model, recipe.folder) if Path(model).is_absolute() else model,
        "served": source.server is not None,
        "system": source.system,
        "seed": recipe.seed,
        **source.sampling.model_dump(),
        **({"trained": _digest(Path(model))} if source.name == TARGET and source.server is None else {}),
    }


def _model(recipe: Recipe, source: RecipeSource) -> str:
    return _trained(recipe) if source.name == TARGET and source.server is None else source.model


def _trained(recipe: Recipe) -> str:
    """Return the model that answers as the target: the SFT model, or the target itself without SFT."""
    return str(Folder(recipe.folder).trained("sft")) if recipe.train.sft is not None else recipe.target


def _digest(model: Path) -> str:
    """Return a digest that changes when a model is trained again: of the JSON files of its folder, the log included."""
    from xxhash import xxh3_128

    digest = xxh3_128()
    for path in sorted(model.glob("*.json*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
