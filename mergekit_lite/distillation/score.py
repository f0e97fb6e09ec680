"""The score stage: every scorer's verdict on every answer of its domains, as ledgers of scores.

One scorer at a time judges, so that one model at a time is in memory. Its verdicts on a source's answers are in
``scores/SCORER/SOURCE.jsonl``. Each row has a digest of what was judged as ``judged``: conversation, reference, tests
and answer, for a function also whether the data have the prompt as a text, for a scorer that compares answers also
those that each is compared with. Where that has changed, the answer is judged again. ``scores/SCORER.json`` holds the
scorer's settings, so that verdicts with different settings are never in one file.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import ANSWER, VERDICT, Key, Prompt, read_rows
from mergekit_lite.answers.scoring.registry import kind_of, open_scorer
from mergekit_lite.answers.scoring.rivals import meets_rivals
from mergekit_lite.answers.scoring.scorer import Judged, Score, Scorer
from mergekit_lite.answers.thoughts import parts_of
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.prompts import stored
from mergekit_lite.distillation.recipe.schema import TARGET, Recipe, RecipeScorer
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rivals import Pool
from mergekit_lite.distillation.settings import as_from, hold_settings
from mergekit_lite.errors import RunError, UsageError, counted, listing

T = TypeVar("T")

SHOWN = 3  # reasons of missing scores in a warning
WINDOWS = 16  # batches, or rounds of concurrent requests, that are judged and written together
WITHOUT_EFFECT = {"name", "domains", "server", "api_key_variable", "concurrency", "batch_size", "allow_code"}
OPTIONS_WITHOUT_EFFECT = ("device", "timeout", "retries")


class Item(NamedTuple):
    """An answer to judge, its key, and a digest of all that a scorer sees."""

    key: Key
    digest: str
    judged: Judged


@dataclass(frozen=True)
class SourceAnswers:
    """The answers of one source to the prompts of a scorer's domains, without their thoughts."""

    path: Path
    prompts: Mapping[str, Prompt]
    domains: tuple[str, ...] | None
    with_form: bool = False  # whether the scorer sees if a prompt is a text or messages
    pool: Pool | None = None  # the answers that it compares each with

    def items(self, problems: list[str]) -> Iterator[Item]:
        """Yield the answers in the order of the file; malformed rows become problems."""
        for line in read_rows(self.path, problems, ANSWER):
            key, text = Key(line.row["prompt"], line.row["index"]), parts_of(line.row).answer
            prompt = self.prompts.get(key.prompt)
            if prompt is None:
                problems.append(f"{self.path}:{line.number}: no {key.prompt!r} among the prompts")
            elif self.domains is None or prompt.domain in self.domains:
                rivals = self.pool.rivals(self.path, key) if self.pool is not None else ()
                yield Item(key, digest_of(prompt, text, self.with_form, rivals), Judged(prompt, text, rivals))


@dataclass(frozen=True)
class ScoringTask:
    """The answers of one source for one scorer, with the ledger of its verdicts."""

    scorer: RecipeScorer
    source: str
    answers: SourceAnswers
    ledger: Ledger[Key]
    digests: Mapping[Key, str]


def score(recipe: Recipe, reporter: Reporter) -> None:
    """Judge every answer that a scorer has not judged yet; those of the trained target too, once they exist.

    Raises:
        UsageError: there are no answers, or a scorer's settings are wrong or not those of its existing verdicts.
        CheckpointError: a model can't be loaded.
        SandboxError: this machine can't sandbox model-written code.
        RunError: a judge's server can't be reached, or none of a source's answers got a score.
    """
    if recipe.rows is not None:
        reporter.line("The rows are given: nothing is scored.")
        return
    tasks = plan(recipe, reporter)
    for scorer in recipe.scorers:
        _hold_settings(recipe, scorer)
    for scorer in recipe.scorers:
        unfinished = [task for task in tasks if task.scorer is scorer and task.ledger.missing]
        if unfinished:
            with open_scorer(scorer) as judge:
                for task in unfinished:
                    _judge(judge, task, reporter)
        for task in (task for task in tasks if task.scorer is scorer):
            _hold_scored(task)
    for task in tasks:
        task.ledger.finish()
    _report_summary(tasks, reporter)


def plan(recipe: Recipe, reporter: Reporter) -> list[ScoringTask]:
    """Return a task for every scorer and every source that has answers.

    Raises:
        UsageError: a source has none.
    """
    folder = Folder(recipe.folder)
    prompts = {prompt.id: prompt for prompt in stored(folder)}
    sources = [source.name for source in recipe.sources]
    absent = [f"{name}: {folder.samples(name)}" for name in sources if not folder.samples(name).exists()]
    if absent:
        raise UsageError(listing("Answers are missing: run the stage `sample` first, to its end", absent))
    if recipe.target_source is not None and folder.samples(TARGET).exists():
        sources.append(TARGET)
    problems: list[str] = []
    pools = _pools(recipe, folder, sources) if any(map(meets_rivals, recipe.scorers)) else {}
    tasks = [
        _task(folder, scorer, name, prompts, pools.get(name) if meets_rivals(scorer) else None, problems)
        for scorer in recipe.scorers
        for name in sources
    ]
    if problems:
        reporter.warn(listing("Rows of answers left out", list(dict.fromkeys(problems))))
    return tasks


def digest_of(prompt: Prompt, answer: str, with_form: bool = False, rivals: Sequence[str] = ()) -> str:
    """Return a digest of all that a scorer sees; ``with_form``: also whether the data have the prompt as a text."""
    turns = [[message["role"], message["content"]] for message in prompt.messages]
    seen = [turns, prompt.reference, prompt.tests, answer, *([prompt.columns] if prompt.columns else [])]
    if with_form:
        seen.append("text" if prompt.plain else "messages")
    if rivals:
        seen.append({"rivals": [*rivals]})
    return xxh3_64_hexdigest(json.dumps(seen).encode())


def _pools(recipe: Recipe, folder: Folder, sources: Sequence[str]) -> dict[str, Pool]:
    """Return the answers that those of each source are compared with.

    They are those of all; but where the target answers once it has learnt from the sources, they are judged before, and
    its answers are compared with each other alone.
    """
    if recipe.train.before_preference is None:
        return dict.fromkeys(sources, Pool(map(folder.samples, sources)))
    asked = Pool(folder.samples(name) for name in sources if name != TARGET)
    return {name: Pool([folder.samples(name)]) if name == TARGET else asked for name in sources}


def _task(
    folder: Folder,
    scorer: RecipeScorer,
    source: str,
    prompts: Mapping[str, Prompt],
    pool: Pool | None,
    problems: list[str],
) -> ScoringTask:
    sees_form = kind_of(scorer.kind).sees_form
    answers = SourceAnswers(folder.samples(source), prompts, scorer.domains, sees_form, pool)
    digests = {item.key: item.digest for item in answers.items(problems)}

    def key_of(row: dict[str, Any]) -> Key:
        key = Key(row["prompt"], row["index"])
        if digests[key] != row["judged"]:
            raise KeyError("a verdict on another answer")
        return key

    ledger = Ledger(folder.scores(scorer.name, source), tuple(digests), key_of, VERDICT)
    return ScoringTask(scorer, source, answers, ledger, digests)


def _judge(judge: Scorer, task: ScoringTask, reporter: Reporter) -> None:
    """Judge what is missing, window by window.

    Windows are cut from all answers, judged before or not. A window of a scorer that reads answers together is judged
    as a whole, so that its scores don't depend on where an earlier run was stopped.
    """
    missing, kind = set(task.ledger.missing), kind_of(task.scorer.kind)
    total = len(task.digests)
    with reporter.progress(f"{task.scorer.name}: {task.source}", total, total - len(missing)) as advance:
        try:
            for window in _windows(task.answers.items([]), WINDOWS * kind.at_once(task.scorer)):
                wanted = [item for item in window if item.key in missing]
                if not wanted:
                    continue
                items = window if kind.read_together else wanted
                verdicts = judge.score([item.judged for item in items])
                task.ledger.append(_row(item, verdict) for item, verdict in zip(items, verdicts, strict=True))
                advance(len(wanted))
        finally:
            task.ledger.close()


def _hold_scored(task: ScoringTask) -> None:
    """Refuse to go on where a scorer gave no score to any answer of a source: pairs would only say that there are none.

    Raises:
        RunError: with the reasons.
    """
    if not task.digests or any(row["score"] is not None for row in task.ledger.rows()):
        return
    reasons = Counter(row["why"] for row in task.ledger.rows())
    folder = task.ledger.path.parent
    raise RunError(
        listing(
            f"The scorer {task.scorer.name} gave no score to any of the {counted(len(task.digests), 'answer')} of "
            f"{task.source}",
            [f"{why} ({count:,}×)" for why, count in reasons.most_common(SHOWN)],
        )
        + f"\nOnce the reason is mended, delete {folder} and run the stage again. Limit the scorer by `domains`, if "
        "it isn't for these prompts."
    )


def _row(item: Item, verdict: Score) -> dict[str, Any]:
    return {
        "prompt": item.key.prompt,
        "index": item.key.number,
        "score": verdict.value,
        "why": verdict.why,
        "judged": item.digest,
    }


def _windows(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while window := list(islice(items, size)):
        yield window


def _hold_settings(recipe: Recipe, scorer: RecipeScorer) -> None:
    folder = Folder(recipe.folder).scores(scorer.name, "").parent
    refusal = f"The scores in {folder} were given in another way" if folder.exists() else None
    advice = (
        "Set it back; or give this scorer another name, to have both side by side; or, to judge again, "
        f"delete {folder}."
    )
    hold_settings(folder.with_name(f"{scorer.name}.json"), _settings(recipe, scorer), "scores", refusal, advice)


def _settings(recipe: Recipe, scorer: RecipeScorer) -> dict[str, Any]:
    """Return the settings that scores depend on. Paths are relative to the recipe's folder, so that it may be moved."""
    settings = scorer.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    settings["options"] = {key: value for key, value in scorer.options.items() if key not in OPTIONS_WITHOUT_EFFECT}
    for key in ("model", "strong", "weak"):
        if settings[key] and Path(settings[key]).is_absolute():
            settings[key] = as_from(recipe.folder, settings[key])
    return settings


def _report_summary(tasks: Sequence[ScoringTask], reporter: Reporter) -> None:
    rows = []
    for task in tasks:
        values: list[float] = []
        reasons: Counter[str] = Counter()
        for row in task.ledger.rows():
            if row["score"] is None:
                reasons[row["why"]] += 1
            else:
                values.append(row["score"])
        mean, spread = (f"{statistics.fmean(values):.4g}", f"{statistics.pstdev(values):.3g}") if values else ("–", "–")
        rows.append((task.scorer.name, task.source, f"{len(values):,}", mean, spread, f"{reasons.total():,}"))
        if reasons:
            shown = ", ".join(f"{why} ({count:,}×)" for why, count in reasons.most_common(SHOWN))
            more = f", and {len(reasons) - SHOWN:,} other reasons" if len(reasons) > SHOWN else ""
            without = f"{counted(reasons.total(), 'answer')} of {task.source} without a score"
            reporter.warn(f"{task.scorer.name}: {without}: {shown}{more}")
    if rows:  # none before the target answers, where there are no other sources
        reporter.table(("scorer", "source", ">scored", ">mean", ">s.d.", ">no score"), rows)
