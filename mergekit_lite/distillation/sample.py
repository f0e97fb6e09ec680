"""The first stage: prompts × sources × samples, as ledgers of answers.

Sources behind servers are asked all at once, those in this process one after the other. ``samples/SOURCE.json`` notes
how a source was asked, so that answers which were drawn in different ways never stand in one file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.answers.asking import Respondent, Task
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.rows import Answer, Key, Prompt, read_rows, seed_of, write_lines
from mergekit_lite.answers.server import Served, Server, answers_of
from mergekit_lite.distillation import prompts
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe import TARGET, Recipe, Source
from mergekit_lite.distillation.reporter import Tell
from mergekit_lite.errors import RunError, UsageError, counted, listing

SHOWN = 3


@dataclass(frozen=True)
class Asked:
    """A source and everything it is asked."""

    source: Source
    tasks: tuple[Task, ...]
    ledger: Ledger[Key]


def sample(recipe: Recipe, tell: Tell, *, skip_missing: bool = False) -> None:
    """Ask every source what it has not answered yet; the trained target too, once it is there.

    Args:
        recipe: what to ask whom.
        tell: who watches.
        skip_missing: finish without the answers that can't be had.

    Raises:
        UsageError: the prompts or a source's settings are not those of the answers that are there.
        RunError: answers are missing at the end.
    """
    check(recipe)
    asked = plan(recipe, prompts.kept(recipe, tell))
    for one in asked:
        _note_settings(recipe, one.source)
    todo = [one for one in asked if one.ledger.missing]
    missing: list[str] = []
    for group in (_served(todo), *([one] for one in todo if not one.source.server)):
        missing += _ask(recipe, group, tell)
    if missing and not skip_missing:
        raise RunError(
            listing("Answers are missing; all others are kept", missing) + "\nThe same command goes on and asks for "
            "what is missing. With --skip-missing the stage ends without it."
        )
    for one in asked:
        answers = len(one.tasks) - len(one.ledger.missing)
        one.ledger.finish(with_missing=skip_missing)
        tell.line(f"{one.source.name}: {counted(answers, 'answer')} in {one.ledger.path}")
    if (why := waits_for(recipe)) is not None:
        tell.line(f"{TARGET}: answers later: {why}")


def check(recipe: Recipe, *, and_target: bool = False) -> None:
    """Look whether the sources that are still to be asked are there.

    Args:
        recipe: the recipe.
        and_target: look for the target as well, which may be on another machine while sources are asked.

    Raises:
        UsageError: with all that are not.
    """
    if missing := missing_models(recipe, and_target=and_target):
        raise UsageError(listing("Models are missing", missing))


def missing_models(recipe: Recipe, *, and_target: bool) -> list[str]:
    """What is still needed and isn't there, as far as that shows without loading it."""
    folder = Folder(recipe.folder)
    models = {
        f"the source {source.name}": source.model
        for source in recipe.sources
        if source.server is None and not folder.samples(source.name).exists()
    }
    if and_target:
        models["the target"] = recipe.target
    return [
        f"{whose}: {model} is no folder"
        for whose, model in models.items()
        if Path(model).is_absolute() and not Path(model).is_dir()
    ]


def plan(recipe: Recipe, asked: Sequence[Prompt]) -> list[Asked]:
    """All that is asked as things stand now: of every source, and of the target where it can answer."""
    found = [_asked(recipe, source, asked) for source in recipe.sources]
    if recipe.target_source is not None and waits_for(recipe) is None:
        found.append(_asked(recipe, recipe.target_source, own_prompts(recipe, asked)))
    return found


def waits_for(recipe: Recipe) -> str | None:
    """Why the target can't answer for itself yet; None where it can, or need not."""
    folder = Folder(recipe.folder)
    if recipe.target_source is None:
        return None
    if not folder.pairs(TARGET).exists():
        return f"{folder.pairs(TARGET)} will tell what it is asked: the stage `pair` writes it"
    if recipe.train.sft is not None and not (folder.trained("sft") / "config.json").exists():
        return f"the stage `train` makes {folder.trained('sft')} first"
    return None


def own_prompts(recipe: Recipe, asked: Iterable[Prompt]) -> list[Prompt]:
    """What the target is asked: the prompts whose pairs wait for its own answers."""
    waiting = {line.row.get("prompt") for line in read_rows(Folder(recipe.folder).pairs(TARGET), [])}
    return [prompt for prompt in asked if prompt.id in waiting]


def tasks_of(recipe: Recipe, source: Source, asked: Iterable[Prompt]) -> tuple[Task, ...]:
    """What a source is asked: so many answers to each prompt of its domains, each with a seed of its own."""
    return tuple(
        Task(prompt, index, seed_of(recipe.seed, source.name, prompt.id, index))
        for prompt in asked
        for index in range(source.answers_to(prompt.domain))
    )


def respondent(recipe: Recipe, source: Source) -> Served | Local:
    """Who answers for a source."""
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


def _asked(recipe: Recipe, source: Source, asked: Iterable[Prompt]) -> Asked:
    tasks = tasks_of(recipe, source, asked)
    path = Folder(recipe.folder).samples(source.name)
    return Asked(source, tasks, Ledger(path, [task.key for task in tasks], key_of))


def key_of(row: dict[str, Any]) -> Key:
    """The key of an answer's row."""
    return Key(row["prompt"], row["index"])


def _served(todo: Iterable[Asked]) -> list[Asked]:
    return [one for one in todo if one.source.server]


def _ask(recipe: Recipe, group: Sequence[Asked], tell: Tell) -> list[str]:
    """Ask one local source, or all servers. Returns what is missing at the end, by source."""
    ledgers = {one.source.name: one.ledger for one in group}
    respondents = {one.source.name: respondent(recipe, one.source) for one in group}
    with ExitStack() as open_:
        advance = {
            one.source.name: open_.enter_context(
                tell.progress(one.source.name, len(one.tasks), len(one.tasks) - len(one.ledger.missing))
            )
            for one in group
        }
        for ledger in ledgers.values():
            open_.callback(ledger.close)
        with closing(_answers([(respondents[one.source.name], one) for one in group])) as answers:
            for answer in answers:
                ledgers[answer.source].append([asdict(answer)])
                advance[answer.source](1)
    return [line for one in group for line in _troubles(recipe, one, respondents[one.source.name], tell)]


def _answers(group: Sequence[tuple[Served | Local, Asked]]) -> Generator[Answer]:
    wanted = [(who, one.tasks, frozenset(one.ledger.missing)) for who, one in group]
    for who, tasks, missing in wanted:
        if isinstance(who, Local):
            yield from who.answers(tasks, missing)
    yield from answers_of([(who, tasks, missing) for who, tasks, missing in wanted if isinstance(who, Served)])


def _to_serve(recipe: Recipe, source: Source) -> str:
    if source.name != TARGET or source.server is None:
        return ""
    return f" The server {source.server} has to serve {_trained(recipe)} as {source.model}."


def _troubles(recipe: Recipe, one: Asked, who: Respondent, tell: Tell) -> Iterator[str]:
    troubles = who.failures
    if troubles.retried:
        reasons = ", ".join(f"{why} {count:,}×" for why, count in troubles.retried.most_common())
        tell.line(f"{one.source.name}: {counted(troubles.retried.total(), 'request')} made again: {reasons}")
    if missing := len(one.ledger.missing):
        why = troubles.stopped or _reasons(troubles.lost)
        yield f"{one.source.name}: {missing:,} of {len(one.tasks):,}. {why}{_to_serve(recipe, one.source)}"


def _reasons(lost: dict[Key, str]) -> str:
    """The most frequent reasons, each with a prompt as an example."""
    example = {why: key.prompt for key, why in lost.items()}
    counts = Counter(lost.values()).most_common()
    told = [f"{why} ({count:,}×, for instance the prompt {example[why]})" for why, count in counts[:SHOWN]]
    return "; ".join(told) + (f"; and {len(counts) - SHOWN:,} other reasons" if len(counts) > SHOWN else "")


def _note_settings(recipe: Recipe, source: Source) -> None:
    """Write down how a source is asked; refuse another way than that of the answers that are there."""
    path = Folder(recipe.folder).samples(source.name).with_suffix(".json")
    now = _settings(recipe, source)
    if path.exists():
        then = _read_settings(path)
        told = [f"{key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in now if then.get(key) != now[key]]
        if told and any(path.with_name(f"{source.name}{end}").exists() for end in (".jsonl", ".partial.jsonl")):
            raise UsageError(
                listing(f"The answers of {source.name} in {path.parent} were drawn in another way", told)
                + f"\nSet it back; or, to ask again, delete {source.name}.* there, and what was made of these answers: "
                f"scores/*/{source.name}.*, pairs and train."
            )
        if not told:
            return
    write_lines(path, [(json.dumps(now, indent=1) + "\n").encode()])


def _settings(recipe: Recipe, source: Source) -> dict[str, Any]:
    model = _model(recipe, source)
    return {
        "model": os.path.relpath(model, recipe.folder) if Path(model).is_absolute() else model,
        "served": source.server is not None,
        "system": source.system,
        "seed": recipe.seed,
        **source.sampling.model_dump(),
        **({"trained": _digest(Path(model))} if source.name == TARGET and source.server is None else {}),
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"Can't read {path}: {error}. Delete it, if the answers are those of this recipe.") from error
    return found if isinstance(found, dict) else {}


def _model(recipe: Recipe, source: Source) -> str:
    if source.name != TARGET or source.server is not None:
        return source.model
    return _trained(recipe)


def _trained(recipe: Recipe) -> str:
    """The model that stands for the target once its SFT is done."""
    return str(Folder(recipe.folder).trained("sft")) if recipe.train.sft is not None else recipe.target


def _digest(model: Path) -> str:
    """What tells a model that was trained again: a digest of what lies beside its weights, the training's log too."""
    from xxhash import xxh3_128

    digest = xxh3_128()
    for path in sorted(model.glob("*.json*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
