"""The second stage: every scorer's verdict on every answer of its domains, as ledgers of scores.

One scorer at a time, so one model at a time is in memory; its verdicts on a source's answers are in
``scores/SCORER/SOURCE.jsonl``. A row remembers what was judged (``judged``, a digest of conversation, reference, tests
and answer): where that is another now, it is judged again. ``scores/SCORER.json`` notes the scorer's settings, so that
verdicts of different ones never stand in one file.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import Key, Prompt, read_rows, write_lines
from mergekit_lite.answers.scoring import scorer as scoring
from mergekit_lite.answers.scoring.registry import kind_of, open_scorer
from mergekit_lite.answers.scoring.scorer import Judged
from mergekit_lite.distillation import prompts
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe import TARGET, Recipe, Scorer
from mergekit_lite.distillation.reporter import Tell
from mergekit_lite.errors import UsageError, counted, listing

T = TypeVar("T")

SHOWN = 3
WINDOWS = 16  # batches, or rounds of open requests, that are judged and written down together
NO_MATTER = ("name", "domains", "server", "api_key_variable", "concurrency", "batch_size", "allow_code")
NO_MATTER_OPTIONS = ("device", "timeout", "retries")


class Item(NamedTuple):
    """An answer to judge, its key, and what tells whether it is still the same."""

    key: Key
    digest: str
    judged: Judged


@dataclass(frozen=True)
class Answers:
    """The answers of one source to the prompts of a scorer's domains."""

    path: Path
    prompts: Mapping[str, Prompt]
    domains: tuple[str, ...] | None

    def items(self, problems: list[str]) -> Iterator[Item]:
        """In the order of the file; what is wrong with rows goes to ``problems``."""
        for line in read_rows(self.path, problems):
            try:
                key, text = Key(line.row["prompt"], line.row["index"]), line.row["text"]
                prompt = self.prompts[key.prompt]
            except KeyError as error:
                problems.append(f"{self.path}:{line.number}: no {error.args[0]!r} in the row, or among the prompts")
                continue
            if self.domains is None or prompt.domain in self.domains:
                yield Item(key, digest_of(prompt, text), Judged(prompt, text))


@dataclass(frozen=True)
class Task:
    """One scorer on one source."""

    scorer: Scorer
    source: str
    answers: Answers
    ledger: Ledger[Key]
    digests: Mapping[Key, str]


def score(recipe: Recipe, tell: Tell) -> None:
    """Judge every answer that a scorer has not judged yet; those of the trained target too, once they are there.

    Raises:
        UsageError: there are no answers, or a scorer's settings are wrong or not those of the verdicts that are there.
        CheckpointError: a model can't be loaded.
        SandboxError: model-written code can't be fenced in here.
        RunError: a judge's server can't be reached.
    """
    tasks = plan(recipe, tell)
    for scorer in recipe.scorers:
        _note_settings(recipe, scorer)
    for scorer in recipe.scorers:
        todo = [task for task in tasks if task.scorer is scorer and task.ledger.missing]
        if todo:
            with open_scorer(scorer) as judge:
                for task in todo:
                    _judge(judge, task, tell)
    for task in tasks:
        task.ledger.finish()
    _tell_summary(tasks, tell)


def plan(recipe: Recipe, tell: Tell) -> list[Task]:
    """Every scorer on every source that has answers.

    Raises:
        UsageError: a source has none.
    """
    folder = Folder(recipe.folder)
    asked = {prompt.id: prompt for prompt in prompts.stored(folder)}
    sources = [source.name for source in recipe.sources]
    absent = [f"{name}: {folder.samples(name)}" for name in sources if not folder.samples(name).exists()]
    if absent:
        raise UsageError(listing("Answers are missing: run the stage `sample` first, to its end", absent))
    if recipe.target_source is not None and folder.samples(TARGET).exists():
        sources.append(TARGET)
    problems: list[str] = []
    tasks = [_task(folder, scorer, name, asked, problems) for scorer in recipe.scorers for name in sources]
    if problems:
        tell.warn(listing("Rows of answers left out", list(dict.fromkeys(problems))))
    return tasks


def digest_of(prompt: Prompt, answer: str) -> str:
    """What stands for all that a scorer sees."""
    turns = [[message["role"], message["content"]] for message in prompt.messages]
    return xxh3_64_hexdigest(json.dumps([turns, prompt.reference, prompt.tests, answer]).encode())


def _task(folder: Folder, scorer: Scorer, source: str, asked: Mapping[str, Prompt], problems: list[str]) -> Task:
    answers = Answers(folder.samples(source), asked, scorer.domains)
    digests = {item.key: item.digest for item in answers.items(problems)}

    def key_of(row: dict[str, Any]) -> Key:
        key = Key(row["prompt"], row["index"])
        if digests[key] != row["judged"]:
            raise KeyError("a verdict on another answer")
        return key

    ledger = Ledger(folder.scores(scorer.name, source), tuple(digests), key_of)
    return Task(scorer, source, answers, ledger, digests)


def _judge(judge: scoring.Scorer, task: Task, tell: Tell) -> None:
    """Judge what is missing, window by window.

    Windows are cut from all answers. Of a scorer whose verdicts depend in the last bits on what is read together, one
    is judged as a whole: so the verdicts don't depend on where a run was stopped.
    """
    missing = set(task.ledger.missing)
    total = len(task.digests)
    with tell.progress(f"{task.scorer.name}: {task.source}", total, total - len(missing)) as advance:
        try:
            for window in _windows(task.answers.items([]), _window_size(task.scorer)):
                wanted = [item for item in window if item.key in missing]
                if not wanted:
                    continue
                items = window if kind_of(task.scorer.kind).read_together else wanted
                scores = judge.score([item.judged for item in items])
                task.ledger.append(_row(item, verdict) for item, verdict in zip(items, scores, strict=True))
                advance(len(wanted))
        finally:
            task.ledger.close()


def _row(item: Item, verdict: scoring.Score) -> dict[str, Any]:
    return {
        "prompt": item.key.prompt,
        "index": item.key.number,
        "score": verdict.value,
        "why": verdict.why,
        "judged": item.digest,
    }


def _window_size(scorer: Scorer) -> int:
    return WINDOWS * kind_of(scorer.kind).at_once(scorer)


def _windows(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while window := list(islice(items, size)):
        yield window


def _note_settings(recipe: Recipe, scorer: Scorer) -> None:
    """Write down how a scorer judges; refuse another way than that of the verdicts that are there."""
    folder = Folder(recipe.folder).scores(scorer.name, "").parent
    path = folder.with_name(f"{scorer.name}.json")
    now = _settings(recipe, scorer)
    if path.exists():
        then = _read_settings(path)
        told = [f"{key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in now if then.get(key) != now[key]]
        if told and folder.exists():
            raise UsageError(
                listing(f"The scores in {folder} were given in another way", told)
                + f"\nSet it back; or give this scorer another name, to have both side by side; or, to judge again, "
                f"delete {folder}."
            )
        if not told:
            return
    write_lines(path, [json.dumps(now, indent=1).encode() + b"\n"])


def _settings(recipe: Recipe, scorer: Scorer) -> dict[str, Any]:
    """What a verdict depends on. Paths are those from the recipe's folder, which may be moved with what it needs."""
    settings = scorer.model_dump(mode="json", exclude=set(NO_MATTER))
    settings["options"] = {key: value for key, value in scorer.options.items() if key not in NO_MATTER_OPTIONS}
    for key in ("model", "strong", "weak"):
        if settings[key] and Path(settings[key]).is_absolute():
            settings[key] = os.path.relpath(settings[key], recipe.folder)
    return settings


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"Can't read {path}: {error}. Delete it, if the scores are those of this recipe.") from error
    return found if isinstance(found, dict) else {}


def _tell_summary(tasks: list[Task], tell: Tell) -> None:
    """How many verdicts, their mean and spread, and how many answers have none."""
    rows = []
    for task in tasks:
        values: list[float] = []
        whys: Counter[str] = Counter()
        for row in task.ledger.rows():
            if row["score"] is None:
                whys[row["why"]] += 1
            else:
                values.append(row["score"])
        mean, spread = (f"{statistics.fmean(values):.4g}", f"{statistics.pstdev(values):.3g}") if values else ("–", "–")
        rows.append((task.scorer.name, task.source, f"{len(values):,}", mean, spread, f"{whys.total():,}"))
        if whys:
            told = ", ".join(f"{why} ({count:,}×)" for why, count in whys.most_common(SHOWN))
            more = f", and {len(whys) - SHOWN:,} other reasons" if len(whys) > SHOWN else ""
            tell.warn(
                f"{task.scorer.name}: {counted(whys.total(), 'answer')} of {task.source} without a score: {told}{more}"
            )
    tell.table(("scorer", "source", ">scored", ">mean", ">s.d.", ">no score"), rows)
