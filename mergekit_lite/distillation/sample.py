"""The sample stage: prompts × sources × samples, as ledgers of answers.

Sources behind servers are asked concurrently, those in this process one after the other; then those that go on from
another one's answers. ``samples/SOURCE.json`` holds the settings of a source's answers, so that answers drawn with
different settings are never in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers import respondents as answering
from mergekit_lite.answers.aggregating.calls import Item, settings_of
from mergekit_lite.answers.aggregating.messages import Draft
from mergekit_lite.answers.aggregating.running import run
from mergekit_lite.answers.asked_model import AskedModel, absent
from mergekit_lite.answers.asking import Notes, Task, reasons, repeated, urls_of
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.rows import ANSWER, Answer, Key, Prompt, own_systems, read_rows, seed_of
from mergekit_lite.answers.server import Served, answers_of
from mergekit_lite.answers.spreading import Crews
from mergekit_lite.distillation.continuing import digest_of, with_beginnings, with_drafts
from mergekit_lite.distillation.data.importing import import_answers
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.prompts import settled
from mergekit_lite.distillation.recipe.schema import TARGET, Recipe, RecipeSource
from mergekit_lite.distillation.remarks import Likeness, remarks
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rounds import take_over
from mergekit_lite.distillation.settings import as_from, hold_settings
from mergekit_lite.distillation.tasks import SourceTasks
from mergekit_lite.errors import RunError, UsageError, counted, listing


def sample(recipe: Recipe, reporter: Reporter, *, skip_missing: bool = False, ray: str | None = None) -> None:
    """Ask every source for the answers it has not given yet; the trained target too, once it exists.

    Args:
        recipe: the recipe.
        reporter: takes progress and results.
        skip_missing: finish without the answers that sources fail to give.
        ray: have models that answer in this process answer on the machines of a Ray cluster instead: ``auto``,
            ``HOST:PORT`` or ``local:N``.

    Raises:
        UsageError: the prompts or a source's settings are not those of the existing answers.
        RunError: answers are missing at the end.
    """
    if recipe.rows is not None:
        reporter.line("The rows are given: nothing is asked.")
        return
    check(recipe)
    prompts = settled(recipe, reporter)
    take_over(recipe)
    for source in (source for source in recipe.sources if source.answers):
        number = import_answers(Folder(recipe.folder), source, prompts, reporter)
        reporter.line(f"{source.name}: {counted(number, 'answer')} given")
    planned = plan(recipe, prompts)
    for each in planned:
        hold_source(recipe, each.source)
    unfinished = [each for each in planned if each.ledger.missing]
    aggregates = [each for each in unfinished if each.source.aggregate is not None]
    unfinished = [each for each in unfinished if each.source.aggregate is None]
    with Crews(ray) as crews:
        missing = _ask_all(recipe, [each for each in unfinished if each.source.continues is None], reporter, crews)
        begun = [each for each in aggregates if not each.source.drafts]
        missing += _aggregate_all(recipe, begun, reporter, skip_missing, crews)
        planned = [
            each if each.source.continues is None else with_beginnings(recipe, each, planned) for each in planned
        ]
        continuing = [each for each in planned if each.source.continues is not None and each.ledger.missing]
        missing += _ask_all(recipe, continuing, reporter, crews)
        planned = [each if each.source.drafts is None else with_drafts(recipe, each, planned) for each in planned]
        refining = [each for each in planned if each.source.drafts and each.ledger.missing]
        missing += _aggregate_all(recipe, refining, reporter, skip_missing, crews)
    if missing and not skip_missing:
        raise RunError(
            listing("Answers are missing; all others are kept", missing) + "\nThe same command goes on and asks for "
            "what is missing. With --skip-missing the stage ends without it."
        )
    for each in planned:
        answers = len(each.ledger.expected) - len(each.ledger.missing)
        each.ledger.finish(with_missing=skip_missing)
        reporter.line(f"{each.source.name}: {counted(answers, 'answer')} in {each.ledger.path}")
        for remark in remarks(each.source, each.ledger.rows()):
            reporter.warn(remark)
    if (why := waits_for(recipe)) is not None:
        reporter.line(f"{TARGET}: answers later: {why}")


def check(recipe: Recipe, *, and_target: bool = False) -> None:
    """Raise UsageError with all missing models of a recipe, as far as they still have to answer.

    The target may be on another machine while sources are asked: it is checked only with ``and_target``.
    """
    if missing := missing_models(recipe, and_target=and_target):
        raise UsageError(listing("Models are missing", missing))


def missing_models(recipe: Recipe, *, and_target: bool) -> list[str]:
    """Return what is still needed here and is not there, as messages: models' folders, programs that serve, vLLM."""
    folder = Folder(recipe.folder)
    needed = [
        (f"the source {source.name}", model)
        for source in recipe.sources
        if not source.answers and not folder.samples(source.name).exists()
        for model in (source.aggregate.models if source.aggregate is not None else [source])
    ]
    for prompts in recipe.prompts:
        if (magpie := prompts.magpie) is not None and not folder.drawn(magpie.name).exists():
            needed.append((f"the model that draws prompts, {magpie.name}", magpie))
        if (written := prompts.written) is not None and not folder.written(written.name).exists():
            needed.append((f"the model that writes prompts, {written.name}", written))
    target = []
    if and_target:
        if Path(recipe.target).is_absolute() and not Path(recipe.target).is_dir():
            target = [f"the target: {recipe.target} is no folder"]
        needed += [(f"the source {TARGET}", recipe.target_source)] if recipe.target_source is not None else []
    chosen_by = [keys for prompts in recipe.prompts for keys in (prompts.distinct, prompts.nearest)]
    embedders = [keys.model for keys in chosen_by if keys is not None]
    return [
        *target,
        *(
            f"the model that embeds prompts: {model} is no folder"
            for model in dict.fromkeys(embedders)
            if model is not None and Path(model).is_absolute() and not Path(model).is_dir()
        ),
        *(f"{whose}: {why}" for whose, model in needed if (why := absent(model))),
    ]


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
    before = recipe.train.before_preference
    if before is not None and not (folder.trained(before) / "config.json").exists():
        return f"the stage `train` makes {folder.trained(before)} first"
    return None


def own_prompts(recipe: Recipe, prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts that the target is asked: those whose pairs wait for its own answers."""
    waiting = {line.row.get("prompt") for line in read_rows(Folder(recipe.folder).pairs(TARGET), [])}
    return [prompt for prompt in prompts if prompt.id in waiting]


def tasks_of(recipe: Recipe, source: RecipeSource, prompts: Iterable[Prompt]) -> tuple[Task, ...]:
    """Return a source's tasks: its number of answers to each prompt of its domains, each with a seed of its own."""
    return tuple(
        Task(prompt, index, seed_of(_seed(recipe, source), source.name, prompt.id, index))
        for prompt in prompts
        for index in range(source.answers_to(prompt.domain))
    )


def _seed(recipe: Recipe, source: RecipeSource) -> int:
    return recipe.seed if source.seed is None else source.seed


def respondent(recipe: Recipe, source: RecipeSource) -> AbstractContextManager[Served | Local]:
    """Give what answers for a source: a client of its server, started where that is asked for, or a model here.

    Raises:
        RunError: the server doesn't start.
    """
    log = Folder(recipe.folder).server_log(source.name)
    return answering.respondent(source, _model(recipe, source), log, one_request=source.one_request)


def key_of(row: dict[str, Any]) -> Key:
    """Return the key of an answer's row."""
    return Key(row["prompt"], row["index"])


def _source_tasks(recipe: Recipe, source: RecipeSource, prompts: Iterable[Prompt]) -> SourceTasks:
    tasks = tasks_of(recipe, source, prompts)
    path = Folder(recipe.folder).samples(source.name)
    return SourceTasks(source, tasks, Ledger(path, [task.key for task in tasks], key_of, ANSWER))


def _aggregate_all(
    recipe: Recipe, asked: Iterable[SourceTasks], reporter: Reporter, skip_missing: bool, crews: Crews
) -> list[str]:
    """Have aggregates answer, one after the other."""
    return [line for each in asked for line in _aggregate(recipe, each, reporter, skip_missing, crews)]


def _ask_all(recipe: Recipe, asked: Sequence[SourceTasks], reporter: Reporter, crews: Crews) -> list[str]:
    """Ask servers at the same time, then the models in this process one after the other."""
    behind_servers = [each for each in asked if each.source.server is not None]
    missing: list[str] = []
    for group in (behind_servers, *([each] for each in asked if each.source.server is None)):
        missing += _ask(recipe, group, reporter, crews)
    return missing


def _ask(recipe: Recipe, group: Sequence[SourceTasks], reporter: Reporter, crews: Crews) -> list[str]:
    """Ask one source in this process, or all servers. Returns a message for each source that answers are missing of."""
    planned = {each.source.name: each for each in group}
    likeness = {each.source.name: Likeness(each.source, each.tasks, each.ledger.missing) for each in group}
    advance: dict[str, Callable[[int], None]] = {}
    for each in group:
        tell_systems(each, reporter)
    with ExitStack() as stack:
        respondents = {each.source.name: stack.enter_context(respondent(recipe, each.source)) for each in group}
        for each in group:
            name, total = each.source.name, len(each.ledger.expected)
            respondents[name].failures.lost.update(each.lost)
            advance[name] = stack.enter_context(reporter.progress(name, total, total - len(each.ledger.missing)))
            stack.callback(each.ledger.close)
        notes = Notes(respondents, reporter.warn)
        with closing(_answers([(respondents[each.source.name], each) for each in group], crews)) as answers:
            for answer in answers:
                planned[answer.source].ledger.append([answer.as_row()])
                advance[answer.source](1)
                if (remark := likeness[answer.source].remark(answer)) is not None:
                    reporter.warn(remark)
                notes.tell()
        notes.tell()
    return [line for each in group for line in _failures(recipe, each, respondents[each.source.name], reporter)]


def tell_systems(asked: SourceTasks, reporter: Reporter) -> None:
    """Report the prompts that a source's system prompt isn't put before."""
    prompts = list({task.prompt.id: task.prompt for task in asked.tasks}.values())
    if (said := own_systems(prompts, asked.source.system)) is not None:
        reporter.line(f"{asked.source.name}: {said}")


def _answers(group: Sequence[tuple[Served | Local, SourceTasks]], crews: Crews) -> Generator[Answer]:
    wanted = [(who, each, frozenset(each.ledger.missing)) for who, each in group]
    for who, each, missing in wanted:
        if isinstance(who, Local):
            yield from crews.answers(who, each.source.device, each.tasks, missing)
    yield from answers_of([(who, each.tasks, missing) for who, each, missing in wanted if isinstance(who, Served)])


def _failures(recipe: Recipe, asked: SourceTasks, who: Served | Local, reporter: Reporter) -> Iterator[str]:
    source, failures = asked.source, who.failures
    for note in who.notes if isinstance(who, Local) else ():
        reporter.line(f"{source.name}: {note}")
    if (said := repeated(failures)) is not None:
        reporter.line(f"{source.name}: {said}")
    if missing := len(asked.ledger.missing):
        why = failures.stopped or reasons(failures.lost)
        message = f"{source.name}: {missing:,} of {len(asked.ledger.expected):,}. {why}"
        if source.name == TARGET and source.server is not None:
            urls = ", ".join(urls_of(source.server))
            message += f" The server {urls} has to serve {_trained(recipe)} as {source.model}."
        yield message


def _aggregate(recipe: Recipe, asked: SourceTasks, reporter: Reporter, skip_missing: bool, crews: Crews) -> list[str]:
    """Have the models of an aggregate answer together. Returns a message for what is missing."""
    source, folder = asked.source, Folder(recipe.folder)
    assert source.aggregate is not None

    def opened(model: AskedModel) -> AbstractContextManager[Served | Local]:
        return answering.respondent(model, model.model, folder.server_log(f"{source.name}.{model.name}"))

    path = folder.steps(source.name)
    begin = {key: (draft,) for key, draft in asked.drafts.items()}
    found = run(
        source.aggregate,
        asked.tasks,
        path,
        opened,
        reporter,
        name=source.name,
        skip_missing=skip_missing,
        begin=begin,
        crews=crews,
    )
    if asked.lost:
        found.missing.append(
            f"{source.name}: {counted(len(asked.lost), 'answer')} can't be made: {reasons(asked.lost)}"
        )
    for message in found.missing if skip_missing else ():
        reporter.warn(message)
    try:
        asked.ledger.append(_made(source.name, item, asked.drafts.get(item.task.key)) for item in found.answered)
    finally:
        asked.ledger.close()
    return found.missing


def _made(source: str, item: Item, draft: Draft | None) -> dict[str, Any]:
    """Return the row of an aggregate's answer."""
    row = Answer(item.task.prompt.id, source, item.task.index, *item.drafts[0].reply).as_row()
    return row if draft is None else {**row, "draft": digest_of(draft)}


def hold_source(recipe: Recipe, source: RecipeSource) -> None:
    """Save the settings of a source's answers. Raises UsageError where it has answers that were drawn with others."""
    path = Folder(recipe.folder).samples(source.name).with_suffix(".json")
    exists = any(path.with_name(f"{source.name}{end}").exists() for end in (".jsonl", ".partial.jsonl"))
    refusal = f"The answers of {source.name} in {path.parent} were drawn in another way"
    advice = (
        f"Set it back; or, to ask again, delete {source.name}.* there, and what was made of these answers: "
        f"scores/*/{source.name}.*, pairs and train."
    )
    hold_settings(path, _settings(recipe, source), "answers", refusal if exists else None, advice)


def _settings(recipe: Recipe, source: RecipeSource) -> dict[str, Any]:
    if source.aggregate is not None:
        models = {each.name: settings_of(each, recipe.folder) for each in source.aggregate.models}
        layers = source.aggregate.model_dump(mode="json", exclude_unset=True)["layers"]
        return {"aggregate": {"models": models, "layers": layers}, "drafts": source.drafts, "seed": recipe.seed}
    model, examples = _model(recipe, source), source.examples()
    return {
        "model": as_from(recipe.folder, model) if Path(model).is_absolute() else model,
        "served": source.is_served,
        "engine": None if source.engine == "transformers" else source.engine,
        "engine_options": source.engine_options or None,
        "one_request": source.one_request or None,
        "continues": source.continues and source.continues.model_dump(mode="json"),
        "system": source.system,
        "in_context": examples and xxh3_64_hexdigest(examples.encode()),
        "seed": _seed(recipe, source),
        **source.sampling.model_dump(mode="json"),
        **({"trained": _digest(Path(model))} if source.name == TARGET and source.server is None else {}),
    }


def _model(recipe: Recipe, source: RecipeSource) -> str:
    return _trained(recipe) if source.name == TARGET and source.server is None else source.model


def _trained(recipe: Recipe) -> str:
    """Return the model that answers as the target: what preference training starts from."""
    before = recipe.train.before_preference
    return recipe.target if before is None else str(Folder(recipe.folder).trained(before))


def _digest(model: Path) -> str:
    """Return a digest that changes when a model is trained again: of the JSON files of its folder, the log included."""
    from xxhash import xxh3_128

    digest = xxh3_128()
    for path in sorted(model.glob("*.json*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
