"""The sample stage: prompts × sources × samples, as ledgers of answers.

Sources behind servers are asked concurrently, those in this process one after the other. ``samples/SOURCE.json`` holds
the settings of a source's answers, so that answers drawn with different settings are never in one file.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.answers.asking import Respondent, Task, urls_of
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.offline import Offline, is_installed
from mergekit_lite.answers.requests import RequestBody
from mergekit_lite.answers.rows import ANSWER, Answer, Key, Prompt, own_systems, read_rows, seed_of
from mergekit_lite.answers.server import Served, Server, answers_of
from mergekit_lite.answers.serving import RunningServer, serve_words, serving, split_command
from mergekit_lite.distillation.data.importing import import_answers
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.prompts import settled
from mergekit_lite.distillation.recipe.schema import TARGET, Recipe, RecipeSource
from mergekit_lite.distillation.remarks import Likeness, remarks
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rounds import take_over
from mergekit_lite.distillation.settings import as_from, hold_settings
from mergekit_lite.distillation.spreading import spread
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.ray_cluster import workers_of
from mergekit_lite.engine.ray_workers import Cluster
from mergekit_lite.errors import RunError, UsageError, counted, listing

SHOWN = 3  # reasons of missing answers in a message


@dataclass(frozen=True)
class SourceTasks:
    """A source, all answers it has to give, and the ledger of those it gave."""

    source: RecipeSource
    tasks: tuple[Task, ...]
    ledger: Ledger[Key]


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
    behind_servers = [each for each in unfinished if each.source.server is not None]
    missing: list[str] = []
    for group in (behind_servers, *([each] for each in unfinished if each.source.server is None)):
        missing += _ask(recipe, group, reporter, ray)
    if missing and not skip_missing:
        raise RunError(
            listing("Answers are missing; all others are kept", missing) + "\nThe same command goes on and asks for "
            "what is missing. With --skip-missing the stage ends without it."
        )
    for each in planned:
        answers = len(each.tasks) - len(each.ledger.missing)
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
        each
        for each in recipe.sources
        if each.server is None and not each.answers and not folder.samples(each.name).exists()
    ]
    models = {f"the source {each.name}": each.model for each in needed if each.serve is None}
    if and_target:
        models["the target"] = recipe.target
        needed += [recipe.target_source] if recipe.target_source is not None else []
    absent = {whose: model for whose, model in models.items() if Path(model).is_absolute() and not Path(model).is_dir()}
    return [
        *(f"{whose}: {model} is no folder" for whose, model in absent.items()),
        *(f"the source {each.name}: there is no {each.model}" for each in needed if each.serve and _is_absent(each)),
        *(f"the source {each.name}: {why}" for each in needed if (why := _missing_program(each))),
    ]


def _is_absent(source: RecipeSource) -> bool:
    """Whether a served model is a path to nothing; it may be a file."""
    return Path(source.model).is_absolute() and not Path(source.model).exists()


def _missing_program(source: RecipeSource) -> str | None:
    if source.serve is not None:
        program = split_command(source.serve)[0]
        return None if shutil.which(program) else f"there is no program {program!r} here, which `serve` names"
    if source.server is None and source.engine == "vllm" and not is_installed():
        return "vLLM is not installed: pip install vllm, or leave `engine` out"
    return None


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


@contextmanager
def respondent(recipe: Recipe, source: RecipeSource) -> Iterator[Served | Local]:
    """Give what answers for a source: a client of its server, started where that is asked for, or a model here.

    Raises:
        RunError: the server doesn't start.
    """
    with ExitStack() as stack:
        if source.is_served:
            running = None
            if source.serve is not None:
                log = Folder(recipe.folder).server_log(source.name)
                words = serve_words(source.serve, f"{source.name}: serve")
                running = stack.enter_context(serving(words, _model(recipe, source), log, source.serve_patience))
            yield Served(source.name, _client(source, running), source.system, source.one_request)
        elif source.engine == "vllm":
            yield Offline(
                source.name,
                _model(recipe, source),
                source.sampling,
                system=source.system,
                dtype=source.dtype,
                options=source.engine_options,
            )
        else:
            yield Local(
                source.name,
                _model(recipe, source),
                source.sampling,
                system=source.system,
                batch_size=source.batch_size,
                device=source.device,
                dtype=source.dtype,
            )


def _client(source: RecipeSource, running: RunningServer | None) -> Server:
    """Return a client of a source's server: of the one that was started for it, where there is one."""
    server = Server(
        urls_of(source.server or ()) if running is None else (running.url,),
        RequestBody(source.model if running is None else running.model, source.sampling),
        key_variable=source.api_key_variable,
        concurrency=source.concurrency,
        timeout=source.timeout,
        retries=source.retries,
    )
    if running is not None:
        server.ended = running.ended
    return server


def key_of(row: dict[str, Any]) -> Key:
    """Return the key of an answer's row."""
    return Key(row["prompt"], row["index"])


def _source_tasks(recipe: Recipe, source: RecipeSource, prompts: Iterable[Prompt]) -> SourceTasks:
    tasks = tasks_of(recipe, source, prompts)
    path = Folder(recipe.folder).samples(source.name)
    return SourceTasks(source, tasks, Ledger(path, [task.key for task in tasks], key_of, ANSWER))


def _ask(recipe: Recipe, group: Sequence[SourceTasks], reporter: Reporter, ray: str | None = None) -> list[str]:
    """Ask one source in this process, or all servers. Returns a message for each source that answers are missing of."""
    planned = {each.source.name: each for each in group}
    likeness = {each.source.name: Likeness(each.source, each.tasks, each.ledger.missing) for each in group}
    advance: dict[str, Callable[[int], None]] = {}
    for each in group:
        tell_systems(each, reporter)
    with ExitStack() as stack:
        respondents = {each.source.name: stack.enter_context(respondent(recipe, each.source)) for each in group}
        for each in group:
            name, total = each.source.name, len(each.tasks)
            advance[name] = stack.enter_context(reporter.progress(name, total, total - len(each.ledger.missing)))
            stack.callback(each.ledger.close)
        told: Counter[str] = Counter()  # notes, by source
        crew = None  # vLLM has workers of its own, a server has none
        if any(type(who) is Local for who in respondents.values()):
            crew = stack.enter_context(_crew(ray, group[0].source))
        with closing(_answers([(respondents[each.source.name], each) for each in group], crew)) as answers:
            for answer in answers:
                planned[answer.source].ledger.append([answer.as_row()])
                advance[answer.source](1)
                if (remark := likeness[answer.source].remark(answer)) is not None:
                    reporter.warn(remark)
                _tell(respondents, told, reporter)
        _tell(respondents, told, reporter)
    return [line for each in group for line in _failures(recipe, each, respondents[each.source.name], reporter)]


def tell_systems(asked: SourceTasks, reporter: Reporter) -> None:
    """Report the prompts that a source's system prompt isn't put before."""
    prompts = list({task.prompt.id: task.prompt for task in asked.tasks}.values())
    if (said := own_systems(prompts, asked.source.system)) is not None:
        reporter.line(f"{asked.source.name}: {said}")


def _tell(respondents: Mapping[str, Respondent], told: Counter[str], reporter: Reporter) -> None:
    """Report what was newly found out about servers."""
    for name, who in respondents.items():
        for note in who.failures.notes[told[name] :]:
            reporter.warn(f"{name}: {note}")
            told[name] += 1


def _crew(ray: str | None, source: RecipeSource) -> AbstractContextManager[Cluster | None]:
    """Return the context of the workers that load a source's model: with a GPU each where it names such a device."""
    return workers_of(ray, CPU if source.device in (None, CPU) else "cuda", threads=1)


def _answers(group: Sequence[tuple[Served | Local, SourceTasks]], crew: Cluster | None) -> Generator[Answer]:
    wanted = [(who, each.tasks, frozenset(each.ledger.missing)) for who, each in group]
    for who, tasks, missing in wanted:
        if crew is not None and isinstance(who, Local):
            yield from spread(crew, who, tasks, missing)
        elif isinstance(who, Local):
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
            urls = ", ".join(urls_of(source.server))
            message += f" The server {urls} has to serve {_trained(recipe)} as {source.model}."
        yield message


def _reasons(lost: dict[Key, str]) -> str:
    example = {why: key.prompt for key, why in lost.items()}
    counts = Counter(lost.values()).most_common()
    shown = [f"{why} ({count:,}×, for instance the prompt {example[why]})" for why, count in counts[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(counts) - SHOWN:,} other reasons" if len(counts) > SHOWN else "")


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
    model = _model(recipe, source)
    return {
        "model": as_from(recipe.folder, model) if Path(model).is_absolute() else model,
        "served": source.is_served,
        "engine": None if source.engine == "transformers" else source.engine,
        "engine_options": source.engine_options or None,
        "one_request": source.one_request or None,
        "system": source.system,
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
