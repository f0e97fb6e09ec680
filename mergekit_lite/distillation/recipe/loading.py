"""YAML to a recipe, or to all of its problems, each with line and column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mergekit_lite.answers.aggregating.recipe import complete
from mergekit_lite.answers.asked_model import located, model_at
from mergekit_lite.answers.data_files import Data
from mergekit_lite.answers.validated import validated
from mergekit_lite.distillation.recipe.checks import contradictions
from mergekit_lite.distillation.recipe.choosing import ChosenPrompts
from mergekit_lite.distillation.recipe.schema import TARGET, Recipe, RecipeScorer, RecipeSource, Train
from mergekit_lite.yaml_document import text_of

NEEDS = "folder, target, prompts, sources, scorers, pairs and train"
D = TypeVar("D", bound=Data)


def load(path: Path) -> Recipe:
    """Return the recipe in a file. Paths in it are relative to the file's folder.

    Raises:
        RecipeError: with every problem, its line and column.
        UsageError: the file can't be read.
    """
    return parse(text_of(path), str(path), path.resolve().parent)


def parse(content: str, source: str, folder: Path) -> Recipe:
    """Return the recipe in a YAML text, as ``load`` does; messages name the ``source``, paths start at ``folder``."""
    return _located(validated(Recipe, content, source, NEEDS, contradictions, _completed), folder)


def _completed(data: dict[str, Any]) -> None:
    """Put in what users leave out: of ``target_source``, and lists around what would be the only thing in them."""
    if isinstance(own := data.get("target_source"), dict):
        data["target_source"] = {"name": TARGET, "model": TARGET, **own}
    if isinstance(data.get("rounds"), int | float):
        data["rounds"] = {"number": data["rounds"]}
    sources = data.get("sources")
    for source in (*(sources if isinstance(sources, list) else ()), data.get("target_source")):
        if not isinstance(source, dict):
            continue
        if isinstance(source.get("aggregate"), dict):
            complete(source["aggregate"])
        continues = source.get("continues")
        if isinstance(continues, dict) and isinstance(continues.get("share"), int | float):
            continues["share"] = [continues["share"]]


def _located(recipe: Recipe, folder: Path) -> Recipe:
    report = recipe.report.model_copy(update={"prompts": _data(recipe.report.prompts, folder)})
    rows = recipe.rows and recipe.rows.model_copy(
        update={"sft": _data(recipe.rows.sft, folder), "preference": _data(recipe.rows.preference, folder)}
    )
    return recipe.model_copy(
        update={
            "folder": folder / recipe.folder.expanduser(),
            "target": model_at(recipe.target, folder),
            "prompts": tuple(_prompts(each, folder) for each in _data(recipe.prompts, folder)),
            "rows": rows,
            "sources": tuple(_source(source, folder) for source in recipe.sources),
            "scorers": tuple(_scorer(scorer, folder) for scorer in recipe.scorers),
            "teachers": tuple(
                teacher.model_copy(update={"model": model_at(teacher.model, folder)}) for teacher in recipe.teachers
            ),
            "report": report,
            "train": _train(recipe.train, folder),
        }
    )


def _train(train: Train, folder: Path) -> Train:
    if train.preference is None or train.preference.reference is None:
        return train
    reference = model_at(train.preference.reference, folder)
    return train.model_copy(update={"preference": train.preference.model_copy(update={"reference": reference})})


def _data(data: tuple[D, ...], folder: Path) -> tuple[D, ...]:
    updates = ({"path": folder / each.path.expanduser()} if each.path else {} for each in data)
    return tuple(each.model_copy(update=update) for each, update in zip(data, updates, strict=True))


def _prompts(prompts: ChosenPrompts, folder: Path) -> ChosenPrompts:
    update: dict[str, Any] = {}
    if (magpie := prompts.magpie) is not None:
        tokenizer = magpie.tokenizer and model_at(magpie.tokenizer, folder)
        update["magpie"] = located(magpie, folder).model_copy(update={"tokenizer": tokenizer})
    if (written := prompts.written) is not None:
        lists = {
            name: each.model_copy(update={"path": folder / each.path.expanduser()})
            for name, each in written.lists.items()
        }
        update["written"] = located(written, folder).model_copy(
            update={"lists": lists, "of": _data(written.of, folder)}
        )
    if (distinct := prompts.distinct) is not None:
        model = distinct.model and model_at(distinct.model, folder)
        update["distinct"] = distinct.model_copy(update={"model": model})
    if (nearest := prompts.nearest) is not None:
        model = nearest.model and model_at(nearest.model, folder)
        update["nearest"] = nearest.model_copy(update={"to": _data(nearest.to, folder), "model": model})
    return prompts.model_copy(update=update)


def _source(source: RecipeSource, folder: Path) -> RecipeSource:
    if source.answers:
        return source.model_copy(update={"answers": _data(source.answers, folder)})
    if source.aggregate is not None:
        return source.model_copy(update={"aggregate": source.aggregate.located(folder)})
    return located(source, folder)


def _scorer(scorer: RecipeScorer, folder: Path) -> RecipeScorer:
    keys = ("strong", "weak") if scorer.server or scorer.kind == "function" else ("model", "strong", "weak")
    named: Mapping[str, str | None] = {key: getattr(scorer, key) for key in keys}
    return scorer.model_copy(update={key: model_at(text, folder) for key, text in named.items() if text})
