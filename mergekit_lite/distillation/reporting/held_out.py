"""Compare the models on prompts that none of them was trained on.

The stages ``sample`` and ``score`` ask and judge them as the sources of an inner distillation in ``report/``, which so
resumes like any other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.intervals import Interval, difference, interval
from mergekit_lite.answers.prompts import load
from mergekit_lite.answers.rows import ANSWER, Key, Message, Prompt, read_rows, seed_of, write_text
from mergekit_lite.answers.scoring.registry import kind_of
from mergekit_lite.answers.thoughts import is_cut, parts_of
from mergekit_lite.answers.traits import Compared, Reasons, preferred, reasons
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.candidates import Inventory, verdicts
from mergekit_lite.distillation.recipe.choosing import ChosenPrompts
from mergekit_lite.distillation.recipe.schema import Pairing, Recipe, RecipeSource, Train
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rounds import all_rounds, made_by
from mergekit_lite.distillation.sample import sample
from mergekit_lite.distillation.score import score
from mergekit_lite.errors import UsageError, counted, listing, shortened
from mergekit_lite.input_files import read_json

UNTRAINED = "untrained"
OWN = {"system", "batch_size", "device", "dtype", "serve", "serve_patience", "concurrency", "timeout", "retries"}
OWN |= {"engine", "engine_options"}  # what the models have of ``target_source``
LENGTH, CUT = "characters", "cut off"  # metrics besides the scorers' names

Metrics = Mapping[str, Mapping[str, float | None]]  # by metric and prompt: the mean over the answers


@dataclass(frozen=True)
class ModelAnswers:
    """A model's answers to the held-out prompts."""

    texts: Mapping[str, str]  # the first answer to each prompt
    metrics: Metrics  # scores, lengths in characters, and shares of answers that the token limit cut off


@dataclass(frozen=True)
class Difference:
    """The difference of a metric between a model and an earlier one, paired by prompt."""

    after: str
    before: str
    metric: str
    interval: Interval

    @property
    def beyond_noise(self) -> bool:
        """Whether 0 is outside of the interval."""
        return self.interval.above or self.interval.below


@dataclass(frozen=True)
class HeldOutComparison:
    """The answers of all models to the held-out prompts: the untrained one's first, then in the order of training."""

    prompts: Sequence[Prompt]
    scorers: Sequence[str]
    answers: Mapping[str, ModelAnswers]

    def mean(self, model: str, metric: str, domain: str | None = None) -> Interval:
        """Return the mean of a metric over the prompts that have it, with its 95 % interval.

        The metric is a scorer's name, ``LENGTH`` or ``CUT``; ``domain`` limits the prompts.
        """
        by_prompt = self._by_prompt(model, metric)
        values = (by_prompt.get(prompt.id) for prompt in self.prompts if domain in (None, prompt.domain))
        return interval([value for value in values if value is not None])

    @cached_property
    def differences(self) -> list[Difference]:
        """Each model against each earlier one, by metric; the longest step of training first."""
        models = list(self.answers)
        gaps = range(len(models) - 1, 0, -1)
        steps = [(after, before) for gap in gaps for before, after in zip(models, models[gap:], strict=False)]
        return [
            Difference(after, before, metric, self.difference(after, before, metric))
            for metric in (*self.scorers, LENGTH)
            for after, before in steps
        ]

    def difference(self, model: str, other: str, metric: str) -> Interval:
        """Return the mean of model − other, paired by prompt, with its 95 % interval."""
        return difference(self._by_prompt(model, metric), self._by_prompt(other, metric))

    @cached_property
    def reasons(self) -> dict[str, Reasons]:
        """Why the last model's answers are preferred to the first's, or aren't, by scorer; empty for few prompts."""
        first, *_, last = self.answers
        found = {scorer: reasons(self._compared(last, first, scorer)) for scorer in self.scorers}
        return {scorer: why for scorer, why in found.items() if why is not None}

    def _compared(self, model: str, other: str, scorer: str) -> list[Compared]:
        ours, theirs = self._by_prompt(model, scorer), self._by_prompt(other, scorer)
        texts, others = self.answers[model].texts, self.answers[other].texts
        return [
            Compared(texts[prompt.id], others[prompt.id], better)
            for prompt in self.prompts
            if prompt.id in texts
            and prompt.id in others
            and (better := preferred(ours.get(prompt.id), theirs.get(prompt.id))) is not None
        ]

    @property
    def domains(self) -> list[str]:
        """The domains of the prompts, in their order."""
        return list(dict.fromkeys(prompt.domain for prompt in self.prompts))

    def examples(self, number: int, seed: int) -> list[Prompt]:
        """Return prompts drawn at random, so that nobody chose them."""
        return sorted(self.prompts, key=lambda prompt: seed_of(seed, "examples", prompt.id))[:number]

    def _by_prompt(self, model: str, metric: str) -> Mapping[str, float | None]:
        return self.answers[model].metrics.get(metric, {})


def compare(recipe: Recipe, reporter: Reporter) -> HeldOutComparison | None:
    """Sample and score the answers that are missing, and return all. None where the recipe has no held-out prompts.

    Raises:
        UsageError: held-out prompts are among those of the training data, or nothing was trained yet.
    """
    models = existing_models(recipe)
    if not recipe.report.prompts:
        return None
    prompts = _held_out(recipe)
    inner = _as_distillation(recipe, models, {prompt.domain for prompt in prompts})
    folder = Folder(inner.folder)
    _discard_outdated(folder, models, reporter)
    sample(inner, reporter)
    score(inner, reporter)
    scorers = {f"-{scorer.name}" if scorer.minimise else scorer.name: scorer.name for scorer in inner.scorers}
    return HeldOutComparison(prompts, [*scorers], {model: _model_answers(folder, model, scorers) for model in models})


def existing_models(recipe: Recipe) -> dict[str, str]:
    """Return the models that can answer: the target, and the trained models that exist so far, or those of rounds.

    Raises:
        UsageError: nothing was trained yet.
    """
    if recipe.rounds is None:
        made = {name: Folder(recipe.folder).trained(name) for name in Train.model_fields}
    else:
        made = {each.folder.name: made_by(each) for each in all_rounds(recipe)}
    finished = {name: str(path) for name, path in made.items() if (path / "config.json").exists()}
    if not finished:
        folders = " or ".join(dict.fromkeys(str(path.parent) for path in made.values()))
        raise UsageError(f"There is no trained model in {folders} to report on: run the stage train first.")
    return {UNTRAINED: recipe.target, **finished}


def _held_out(recipe: Recipe) -> list[Prompt]:
    loaded = load(recipe.report.prompts)
    rows = (line.row for line in read_rows(Folder(recipe.folder).prompts, []))
    training_ids = {_question(row["messages"]): row["id"] for row in rows}
    shared = [prompt for prompt in loaded.prompts if _question(prompt.messages) in training_ids]
    if shared:
        pairs = ((shortened(prompt.id, 60), training_ids[_question(prompt.messages)]) for prompt in shared)
        listed = [f"{held_out} is {training} there" for held_out, training in pairs]
        title = f"{counted(len(shared), 'held-out prompt')} of {len(loaded.prompts):,} are among the training prompts"
        raise UsageError(
            f"{listing(title, listed, shown=5)}\nA comparison on them would tell what was learnt by heart."
        )
    if not loaded.prompts:
        raise UsageError(listing("There is no held-out prompt", loaded.problems or ["the data have no rows"]))
    return loaded.prompts


def _question(messages: Iterable[Message]) -> str:
    """Return a digest of the messages that ignores case and white space."""
    plain = [[message["role"], " ".join(message["content"].split()).casefold()] for message in messages]
    return xxh3_64_hexdigest(json.dumps(plain).encode())


def _as_distillation(recipe: Recipe, models: Mapping[str, str], domains: set[str]) -> Recipe:
    """Return the recipe of the inner distillation: the models as sources, and the scorers that judge its domains."""
    wanted = recipe.report.scores
    scorers = [
        scorer.model_copy(update={"domains": scorer.domains and tuple(d for d in scorer.domains if d in domains)})
        for scorer in recipe.scorers
        if kind_of(scorer.kind).judges  # nobody has scored these answers
        and (wanted is None or scorer.name in wanted)
        and (scorer.domains is None or domains & {*scorer.domains})
    ]
    return recipe.model_copy(
        update={
            "folder": recipe.folder / "report",
            "rounds": None,
            "rows": None,
            "prompts": tuple(ChosenPrompts.model_validate(each.model_dump()) for each in recipe.report.prompts),
            "sources": tuple(_source(recipe, name, model) for name, model in models.items()),
            "target_source": None,
            "scorers": tuple(scorers),
            "pairs": Pairing(rule="as_is"),
        }
    )


def _source(recipe: Recipe, name: str, model: str) -> RecipeSource:
    """Return a model as a source: behind a server that runs, or in the way of ``target_source``."""
    report, own = recipe.report, recipe.target_source
    common: dict[str, Any] = {"name": name, "samples": report.samples, "sampling": report.sampling}
    if name in report.servers:
        return RecipeSource(**common, server=report.servers[name], model=name)
    settings = own.model_dump(include=OWN) if own is not None else {}
    return RecipeSource(**common, model=model, **settings)


def _discard_outdated(folder: Folder, models: Mapping[str, str], reporter: Reporter) -> None:
    """Delete the answers of models that were trained again since, and their scores."""
    path = folder.root / "models.json"
    then = read_json(path) if path.exists() else {}
    now = {name: _identity(Path(model)) for name, model in models.items()}
    for name in now:
        if name in then and then[name] != now[name]:
            reporter.line(f"{name} was trained anew: what it answered before is thrown away")
            for file in [*folder.root.glob(f"samples/{name}.*"), *folder.root.glob(f"scores/*/{name}.*")]:
                file.unlink()
    write_text(path, json.dumps({**then, **now}, indent=1) + "\n")


def _identity(model: Path) -> str:
    """Return a digest of a training's settings and log, whose figures no two runs share, or of a merge's manifest."""
    files = [model / name for name in ("training.json", "log.jsonl", "mergekit_lite_manifest.json")]
    return xxh3_64_hexdigest(b"".join(file.read_bytes() for file in files if file.exists()))


def _model_answers(folder: Folder, model: str, scorers: Mapping[str, str]) -> ModelAnswers:
    """Read a model's answers and their scores.

    ``scorers`` are by the name that is shown: with a minus where lower is better, as such scores have the other sign,
    so that higher is better everywhere.
    """
    rows = [line.row for line in read_rows(folder.samples(model), [], {**ANSWER, "finish": str})]
    texts = {row["prompt"]: parts_of(row).whole for row in sorted(rows, key=lambda row: -row["index"])}
    metrics: dict[str, Mapping[str, float | None]] = {}
    for shown, scorer in scorers.items():
        judged = verdicts(folder, scorer, model, Inventory())
        keys = (Key(row["prompt"], row["index"]) for row in rows)
        metrics[shown] = _means((key.prompt, judged[key]) for key in keys if key in judged)
    metrics[LENGTH] = _means((row["prompt"], float(len(parts_of(row).answer))) for row in rows)
    metrics[CUT] = _means((row["prompt"], float(is_cut(row))) for row in rows)
    return ModelAnswers(texts, metrics)


def _means(values: Iterable[tuple[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of each prompt's values that are not None; None for a prompt without any."""
    by_prompt: defaultdict[str, list[float]] = defaultdict(list)
    for prompt, value in values:
        by_prompt[prompt] += [] if value is None else [value]
    return {prompt: fmean(numbers) if numbers else None for prompt, numbers in by_prompt.items()}
