"""YAML to a recipe, or to all of its problems, each with line and column."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mergekit_lite.answers.data_files import Data
from mergekit_lite.distillation.recipe.checks import contradictions
from mergekit_lite.distillation.recipe.problems import KeyPath
from mergekit_lite.distillation.recipe.schema import TARGET, Recipe, RecipeScorer, RecipeSource, Train
from mergekit_lite.errors import nearest
from mergekit_lite.yaml_document import Fields, Items, Mark, Node, RecipeError, Remark, Scalar, describe, read, text_of

NEEDS = "folder, target, prompts, sources, scorers, pairs and train"
D = TypeVar("D", bound=Data)
EXPECTED = {  # pydantic's types of errors: what to tell a user who knows no Python
    "string_type": "text: put it in quotes, if it is one",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-'",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "path_type": "a path",
}


def load(path: Path) -> Recipe:
    """Return the recipe in a file. Paths in it are relative to the file's folder.

    Raises:
        RecipeError: with every problem, its line and column.
        UsageError: the file can't be read.
    """
    return parse(text_of(path), str(path), path.resolve().parent)


def parse(content: str, source: str, folder: Path) -> Recipe:
    """Return the recipe in a YAML text, as ``load`` does; messages name the ``source``, paths start at ``folder``."""
    root = read(content, source, NEEDS)
    if not isinstance(root, Fields):
        raise RecipeError(source, [Remark(root.at, f"a recipe is a mapping with {NEEDS}, got {describe(root)}")])
    problems: list[Remark] = []
    data = _plain(root, problems)
    target_source = data.get("target_source")
    if isinstance(target_source, dict):  # users leave its name and model out
        data["target_source"] = {"name": TARGET, "model": TARGET, **target_source}
    if isinstance(data.get("rounds"), int | float):
        data["rounds"] = {"number": data["rounds"]}
    try:
        # From JSON, as strict validation of Python objects takes no list for a tuple and no text for a path.
        recipe = Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _described(root, error)
    if problems:
        raise RecipeError(source, problems)
    problems = [Remark(_place(root, problem.at).node.at, problem.text) for problem in contradictions(recipe)]
    if problems:
        raise RecipeError(source, problems)
    return _located(recipe, folder)


def _plain(node: Node, problems: list[Remark]) -> Any:
    """Return a tree as JSON values. A key without a value is left out, so it has its default."""
    if isinstance(node, Items):
        return [_plain(item, problems) for item in node.items]
    if isinstance(node, Fields):
        return {
            key.text: _plain(value, problems)
            for key, value in node.entries
            if not (isinstance(value, Scalar) and value.value is None)
        }
    if isinstance(node.value, float) and not math.isfinite(node.value):
        problems.append(Remark(node.at, f"{node.text} is no number to compute with"))
        return 0.0
    return node.value


class _Place(NamedTuple):
    node: Node
    key: Scalar | None  # the node's key in its mapping


def _place(root: Node, path: KeyPath) -> _Place:
    """Return the node at a path, or where a key is absent the last node before it."""
    node, key = root, None
    for step in path:
        if isinstance(node, Items) and isinstance(step, int) and step < len(node.items):
            node, key = node.items[step], None
            continue
        entry = next((e for e in node.entries if e[0].text == step), None) if isinstance(node, Fields) else None
        if entry is None:
            break
        key, node = entry
    return _Place(node, key)


def _described(root: Node, error: ValidationError) -> Iterator[Remark]:
    """Yield pydantic's errors as remarks. A value that fits none of several types is one remark with all of them."""
    expected: dict[tuple[Mark, str], list[str]] = {}
    for details in error.errors(include_url=False, include_context=True):
        at, subject, expectation = _remark(root, details)
        expected.setdefault((at, subject), []).append(expectation)
    for (at, subject), expectations in expected.items():
        yield Remark(at, subject + ", or ".join(dict.fromkeys(expectations)))


def _remark(root: Node, details: ErrorDetails) -> tuple[Mark, str, str]:
    """Return where one of pydantic's errors is, its subject with what was got, and what was expected or a hint."""
    path = details["loc"]
    place = _place(root, path)
    name = str(place.key.text) if place.key else "an entry" if place.node is not root else "the recipe"
    if details["type"] == "extra_forbidden":
        key = str(path[-1])
        known = _known(path[:-1])
        hint = nearest(key, known) or f" Known: {', '.join(known)}."
        parent = _place(root, path[:-1])
        inside = parent.key.text if parent.key else _owner(path[:-1])
        return (place.key.at if place.key else place.node.at), f"unknown key {key!r} in {inside}.", hint
    if details["type"] == "missing" and isinstance(path[-1], int):
        return place.node.at, f"{name!r} has too few values", ""
    if details["type"] == "missing":
        return place.node.at, f"{_owner(path[:-1])} has no {str(path[-1])!r}", ""
    got = describe(place.node)
    expected = EXPECTED.get(details["type"]) or details["msg"].removeprefix("Input should be ")
    hint = nearest(place.node.text, re.findall("'([^']+)'", expected)) if isinstance(place.node, Scalar) else ""
    expected += f".{hint}" if hint else ""
    return place.node.at, f"{name!r} is {got}, expected " if place.key else f"{got}: expected ", expected


def _owner(path: KeyPath) -> str:
    """Return a path as text, counted from 1: ``sources[2]``."""
    steps = (f"[{step + 1}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).lstrip(".") or "the recipe"


def _known(path: KeyPath) -> list[str]:
    kind: Any = Recipe
    for step in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(step))
            kind = _bare(field.annotation) if field else None
        else:  # a list or a mapping: the type of its values
            kind = _bare(get_args(kind)[-1 if get_origin(kind) is dict else 0]) if get_args(kind) else None
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _bare(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return _bare(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


def _located(recipe: Recipe, folder: Path) -> Recipe:
    report = recipe.report.model_copy(update={"prompts": _data(recipe.report.prompts, folder)})
    rows = recipe.rows and recipe.rows.model_copy(
        update={"sft": _data(recipe.rows.sft, folder), "preference": _data(recipe.rows.preference, folder)}
    )
    return recipe.model_copy(
        update={
            "folder": folder / recipe.folder.expanduser(),
            "target": _model(recipe.target, folder),
            "prompts": _data(recipe.prompts, folder),
            "rows": rows,
            "sources": tuple(_source(source, folder) for source in recipe.sources),
            "scorers": tuple(_scorer(scorer, folder) for scorer in recipe.scorers),
            "teachers": tuple(
                teacher.model_copy(update={"model": _model(teacher.model, folder)}) for teacher in recipe.teachers
            ),
            "report": report,
            "train": _train(recipe.train, folder),
        }
    )


def _train(train: Train, folder: Path) -> Train:
    if train.preference is None or train.preference.reference is None:
        return train
    reference = _model(train.preference.reference, folder)
    return train.model_copy(update={"preference": train.preference.model_copy(update={"reference": reference})})


def _data(data: tuple[D, ...], folder: Path) -> tuple[D, ...]:
    located = ({"path": folder / each.path.expanduser()} if each.path else {} for each in data)
    return tuple(each.model_copy(update=update) for each, update in zip(data, located, strict=True))


def _source(source: RecipeSource, folder: Path) -> RecipeSource:
    if source.answers:
        return source.model_copy(update={"answers": _data(source.answers, folder)})
    return source if source.server else source.model_copy(update={"model": _model(source.model, folder)})


def _scorer(scorer: RecipeScorer, folder: Path) -> RecipeScorer:
    keys = ("strong", "weak") if scorer.server or scorer.kind == "function" else ("model", "strong", "weak")
    named: Mapping[str, str | None] = {key: getattr(scorer, key) for key in keys}
    return scorer.model_copy(update={key: _model(text, folder) for key, text in named.items() if text})


def _model(text: str, folder: Path) -> str:
    """Return a model's path resolved against the recipe's folder, or its name on the hub unchanged."""
    path = Path(text).expanduser()
    is_path = path.is_absolute() or text.startswith((".", "~")) or (folder / path).exists()
    return str((folder / path).resolve()) if is_path else text
