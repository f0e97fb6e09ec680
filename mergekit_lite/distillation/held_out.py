"""The models on prompts that none of them was trained on: asked and scored by the stages ``sample`` and ``score``.

The folder ``report/`` is for them the folder of a distillation whose sources are the target as it was (``untrained``),
after SFT and after preference training. So a killed report goes on like any other stage.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.intervals import Interval, interval, paired
from mergekit_lite.answers.prompts import load
from mergekit_lite.answers.rows import Key, Message, Prompt, read_rows, seed_of, write_text
from mergekit_lite.distillation.candidates import Reading, verdicts
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe import Pairs, Recipe, Scorer, Source
from mergekit_lite.distillation.reporter import Tell
from mergekit_lite.distillation.sample import sample
from mergekit_lite.distillation.score import score
from mergekit_lite.errors import UsageError, counted, listing, shortened

Model = Literal["untrained", "sft", "preference"]
MODELS: tuple[Model, ...] = ("untrained", "sft", "preference")
LENGTH, CUT = "characters", "cut off"  # figures beside the scores

Figures = Mapping[str, Mapping[str, float | None]]  # by scorer, then by prompt: the mean over its answers


@dataclass(frozen=True)
class Answered:
    """What a model answered to the held-out prompts.

    Attributes:
        texts: the first answer to each prompt.
        figures: scores, and beside them length in characters and the share of answers that the limit cut off.
    """

    texts: Mapping[str, str]
    figures: Figures


@dataclass(frozen=True)
class Difference:
    """One model against one that was before it, prompt by prompt."""

    after: Model
    before: Model
    figure: str
    of: Interval

    @property
    def beyond_noise(self) -> bool:
        """Whether 0 is outside of the interval."""
        return self.of.above or self.of.below


@dataclass(frozen=True)
class Comparison:
    """All models on the held-out prompts."""

    prompts: Sequence[Prompt]
    scorers: Sequence[str]
    answered: Mapping[Model, Answered]

    def mean(self, model: Model, figure: str, domain: str | None = None) -> Interval:
        """Over the prompts (of one domain) that have the figure."""
        values = self.answered[model].figures.get(figure, {})
        of = (values.get(prompt.id) for prompt in self.prompts if domain in (None, prompt.domain))
        return interval([value for value in of if value is not None])

    @cached_property
    def differences(self) -> list[Difference]:
        """Each model against each before it, the longest way first."""
        there = [model for model in MODELS if model in self.answered]
        ways = [(after, before) for gap in (2, 1) for before, after in zip(there, there[gap:], strict=False)]
        return [
            Difference(after, before, figure, self.against(after, before, figure))
            for figure in (*self.scorers, LENGTH)
            for after, before in ways
        ]

    def against(self, ours: Model, theirs: Model, figure: str) -> Interval:
        """Ours − theirs, prompt by prompt."""
        return interval(paired(self._figures(ours, figure), self._figures(theirs, figure)))

    @property
    def domains(self) -> list[str]:
        """Of the prompts, in their order."""
        return list(dict.fromkeys(prompt.domain for prompt in self.prompts))

    def examples(self, number: int, seed: int) -> list[Prompt]:
        """So many prompts, drawn by chance, so that nobody chose them."""
        return sorted(self.prompts, key=lambda prompt: seed_of(seed, "examples", prompt.id))[:number]

    def _figures(self, model: Model, figure: str) -> Mapping[str, float | None]:
        return self.answered[model].figures.get(figure, {})


def compare(recipe: Recipe, tell: Tell) -> Comparison | None:
    """Ask and score what is missing, and read it all. None where the recipe has no held-out prompts.

    Raises:
        UsageError: held-out prompts are among those of the training data, or no model is there.
    """
    if not recipe.report.prompts:
        return None
    prompts = _held_out(recipe)
    models = there(recipe)
    inner = _as_distillation(recipe, models, {prompt.domain for prompt in prompts})
    folder = Folder(inner.folder)
    _forget_other_models(folder, models, tell)
    sample(inner, tell)
    score(inner, tell)
    scorers = [scorer.name for scorer in inner.scorers]
    return Comparison(prompts, scorers, {model: _answered(folder, model, scorers) for model in models})


def there(recipe: Recipe) -> dict[Model, str]:
    """The models that can answer: the target, and what training made of it so far.

    Raises:
        UsageError: nothing was trained yet.
    """
    folder = Folder(recipe.folder)
    trained: dict[Model, Path] = {"sft": folder.trained("sft"), "preference": folder.trained("preference")}
    found: dict[Model, str] = {name: str(path) for name, path in trained.items() if (path / "config.json").exists()}
    if not found:
        raise UsageError(
            f"There is no trained model in {folder.root / 'train'} to report on: run the stage train first."
        )
    return {"untrained": recipe.target, **found}


def _held_out(recipe: Recipe) -> list[Prompt]:
    loaded = load(recipe.report.prompts)
    trained = {
        _asked(row["messages"]): row["id"]
        for row in (line.row for line in read_rows(Folder(recipe.folder).prompts, []))
    }
    shared = [prompt for prompt in loaded.prompts if _asked(prompt.messages) in trained]
    if shared:
        told = [f"{shortened(prompt.id, 60)} is {trained[_asked(prompt.messages)]} there" for prompt in shared]
        title = f"{counted(len(shared), 'held-out prompt')} of {len(loaded.prompts):,} are among the training prompts"
        raise UsageError(listing(title, told, shown=5) + "\nA comparison on them would tell what was learnt by heart.")
    if not loaded.prompts:
        raise UsageError(listing("There is no held-out prompt", loaded.problems or ["the data have no rows"]))
    return loaded.prompts


def _asked(messages: Iterable[Message]) -> str:
    """What is asked, whatever the case and the blanks."""
    plain = [[message["role"], " ".join(message["content"].split()).casefold()] for message in messages]
    return xxh3_64_hexdigest(json.dumps(plain).encode())


def _as_distillation(recipe: Recipe, models: Mapping[Model, str], domains: set[str]) -> Recipe:
    """The recipe of the inner distillation: held-out prompts, models for sources, scorers of what they judge."""
    wanted = recipe.report.scores
    scorers = tuple(
        _narrowed(scorer, domains)
        for scorer in recipe.scorers
        if (wanted is None or scorer.name in wanted) and (scorer.domains is None or domains & {*scorer.domains})
    )
    return recipe.model_copy(
        update={
            "folder": recipe.folder / "report",
            "prompts": recipe.report.prompts,
            "sources": tuple(_source(recipe, name, model) for name, model in models.items()),
            "target_source": None,
            "scorers": scorers,
            "pairs": Pairs(rule="as_is"),
        }
    )


def _narrowed(scorer: Scorer, domains: set[str]) -> Scorer:
    if scorer.domains is None:
        return scorer
    return scorer.model_copy(update={"domains": tuple(one for one in scorer.domains if one in domains)})


def _source(recipe: Recipe, name: Model, model: str) -> Source:
    """A model as a source; it works in this process as the target does, where the recipe says how."""
    report = recipe.report
    server = report.servers.get(name)
    common: dict[str, Any] = {"name": name, "samples": report.samples, "sampling": report.sampling}
    if server is not None:
        return Source(**common, server=server, model=name)
    own = recipe.target_source
    if own is None:
        return Source(**common, model=model)
    return Source(**common, model=model, system=own.system, **own.model_dump(include={"batch_size", "device", "dtype"}))


def _forget_other_models(folder: Folder, models: Mapping[Model, str], tell: Tell) -> None:
    """Throw away what a model answered that was trained anew since."""
    path = folder.root / "models.json"
    then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now = {name: _identity(Path(model)) for name, model in models.items()}
    for name in now:
        if name in then and then[name] != now[name]:
            tell.line(f"{name} was trained anew: what it answered before is thrown away")
            for file in [*folder.root.glob(f"samples/{name}.*"), *folder.root.glob(f"scores/*/{name}.*")]:
                file.unlink()
    write_text(path, json.dumps({**then, **now}, indent=1) + "\n")


def _identity(model: Path) -> str:
    """What tells one run of training from another: its settings and its log, whose figures no two runs share."""
    files = [model / "training.json", model / "log.jsonl"]
    return xxh3_64_hexdigest(b"".join(file.read_bytes() for file in files if file.exists()))


def _answered(folder: Folder, model: Model, scorers: Sequence[str]) -> Answered:
    rows = [line.row for line in read_rows(folder.samples(model), [])]
    texts = {row["prompt"]: row["text"] for row in sorted(rows, key=lambda row: -row["index"])}
    figures: dict[str, Mapping[str, float | None]] = {}
    for scorer in scorers:
        said = verdicts(folder, scorer, model, Reading())
        keys = (Key(row["prompt"], row["index"]) for row in rows)
        figures[scorer] = _by_prompt((key.prompt, said[key].value) for key in keys if key in said)
    figures[LENGTH] = _by_prompt((row["prompt"], float(len(row["text"]))) for row in rows)
    figures[CUT] = _by_prompt((row["prompt"], float(row["finish"] == "length")) for row in rows)
    return Answered(texts, figures)


def _by_prompt(values: Iterable[tuple[str, float | None]]) -> dict[str, float | None]:
    """The mean over the answers to each prompt that have a value."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for prompt, value in values:
        found[prompt] += [] if value is None else [value]
    return {prompt: fmean(of) if of else None for prompt, of in found.items()}
