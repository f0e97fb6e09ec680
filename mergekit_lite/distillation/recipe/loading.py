"""From a YAML file to a recipe, or to everything that is wrong with it, each with line and column."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mergekit_lite.answers.prompts import Prompts
from mergekit_lite.distillation.checks import contradictions
from mergekit_lite.distillation.recipe import TARGET, Recipe, Scorer, Source
from mergekit_lite.errors import nearest
from mergekit_lite.yaml_document import (
    Fields,
    Items,
    Mark,
    Node,
    RecipeError,
    Remark,
    Scalar,
    describe,
    read,
    text_of,
)

NEEDS = "folder, target, prompts, sources, scorers, pairs and train"
EXPECTED = {  # for pydantic's words, which are a programmer's
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
    """The recipe in a file. Paths in it are relative to the file's folder.

    Raises:
        RecipeError: with every problem and its place.
        UsageError: the file can't be read.
    """
    return parse(text_of(path), str(path), path.resolve().parent)


def parse(content: str, source: str, folder: Path) -> Recipe:
    """The recipe in a YAML text.

    Args:
        content: the text.
        source: where it is from, for messages.
        folder: what its paths are relative to.

    Raises:
        RecipeError: with every problem and its place.
    """
    root = read(content, source, NEEDS)
    if not isinstance(root, Fields):
        raise RecipeError(source, [Remark(root.at, f"a recipe is a mapping with {NEEDS}, got {describe(root)}")])
    problems: list[Remark] = []
    data = _plain(root, problems)
    own = data.get("target_source")
    if isinstance(own, dict):  # its name and model are known
        data["target_source"] = {"name": TARGET, "model": TARGET, **own}
    try:
        recipe = Recipe.model_validate_json(json.dumps(data), strict=True)  # JSON: lists for tuples, texts for paths
    except ValidationError as error:
        problems += _described(root, error)
    if problems:
        raise RecipeError(source, problems)
    wrong = [Remark(_place(root, problem.at).node.at, problem.text) for problem in contradictions(recipe)]
    if wrong:
        raise RecipeError(source, wrong)
    return _located(recipe, folder)


def _plain(node: Node, problems: list[Remark]) -> Any:
    """A tree as JSON has it. A key without a value is as good as no key."""
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
    """Where in the tree something is."""

    node: Node
    key: Scalar | None  # the node's own key, where it is in a mapping
    rest: tuple[int | str, ...]  # of the way there: what is not in the tree


def _place(root: Node, way: tuple[int | str, ...]) -> _Place:
    """Follow a way of keys and numbers as far as it goes."""
    node, key = root, None
    for done, step in enumerate(way):
        if isinstance(node, Items) and isinstance(step, int) and step < len(node.items):
            node, key = node.items[step], None
            continue
        entry = next((e for e in node.entries if e[0].text == step), None) if isinstance(node, Fields) else None
        if entry is None:
            return _Place(node, key, way[done:])
        key, node = entry
    return _Place(node, key, ())


def _described(root: Node, error: ValidationError) -> Iterator[Remark]:
    """pydantic's errors as remarks. A value that suits none of several types is told once, with all of them."""
    found: dict[tuple[Mark, str], list[str]] = {}
    for details in error.errors(include_url=False, include_context=True):
        at, what, why = _remark(root, details)
        found.setdefault((at, what), []).append(why)
    for (at, what), reasons in found.items():
        yield Remark(at, what + ", or ".join(dict.fromkeys(reasons)))


def _remark(root: Node, details: ErrorDetails) -> tuple[Mark, str, str]:
    way = details["loc"]
    place = _place(root, way)
    name = str(place.key.text) if place.key else "an entry" if place.node is not root else "the recipe"
    if details["type"] == "extra_forbidden":
        key = str(way[-1])
        known = _known(way[:-1])
        hint = nearest(key, known) or f" Known: {', '.join(known)}."
        parent = _place(root, way[:-1])
        inside = parent.key.text if parent.key else _owner(way[:-1])
        return (place.key.at if place.key else place.node.at), f"unknown key {key!r} in {inside}.", hint
    if details["type"] == "missing" and isinstance(way[-1], int):
        return place.node.at, f"{name!r} has too few values", ""
    if details["type"] == "missing":
        return place.node.at, f"{_owner(way[:-1])} has no {str(way[-1])!r}", ""
    got = describe(place.node)
    expected = EXPECTED.get(details["type"]) or details["msg"].removeprefix("Input should be ")
    hint = nearest(place.node.text, re.findall("'([^']+)'", expected)) if isinstance(place.node, Scalar) else ""
    expected += f".{hint}" if hint else ""
    return place.node.at, f"{name!r} is {got}, expected " if place.key else f"{got}: expected ", expected


def _owner(way: tuple[int | str, ...]) -> str:
    """``sources[2]``, for messages."""
    return "".join(f"[{step + 1}]" if isinstance(step, int) else f".{step}" for step in way).lstrip(".") or "the recipe"


def _known(way: tuple[int | str, ...]) -> list[str]:
    """The keys that the mapping at a place may have."""
    found: Any = Recipe
    for step in way:
        if isinstance(found, type) and issubclass(found, BaseModel):
            field = found.model_fields.get(str(step))
            found = _bare(field.annotation) if field else None
        else:  # a list or a mapping: its values
            found = _bare(get_args(found)[-1 if get_origin(found) is dict else 0]) if get_args(found) else None
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []


def _bare(annotation: Any) -> Any:
    """A type without what Annotated and ``| None`` add."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return _bare(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


def _located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the paths of its own folder."""
    report = recipe.report.model_copy(update={"prompts": tuple(_prompts(p, folder) for p in recipe.report.prompts)})
    return recipe.model_copy(
        update={
            "folder": folder / recipe.folder.expanduser(),
            "target": _model(recipe.target, folder),
            "prompts": tuple(_prompts(prompts, folder) for prompts in recipe.prompts),
            "sources": tuple(_source(source, folder) for source in recipe.sources),
            "scorers": tuple(_scorer(scorer, folder) for scorer in recipe.scorers),
            "report": report,
        }
    )


def _prompts(prompts: Prompts, folder: Path) -> Prompts:
    return prompts.model_copy(update={"path": folder / prompts.path.expanduser()}) if prompts.path else prompts


def _source(source: Source, folder: Path) -> Source:
    return source if source.server else source.model_copy(update={"model": _model(source.model, folder)})


def _scorer(scorer: Scorer, folder: Path) -> Scorer:
    keys = ("strong", "weak") if scorer.server or scorer.kind == "function" else ("model", "strong", "weak")
    named: Mapping[str, str | None] = {key: getattr(scorer, key) for key in keys}
    return scorer.model_copy(update={key: _model(text, folder) for key, text in named.items() if text})


def _model(text: str, folder: Path) -> str:
    """A model's path from the recipe's folder; what is no path there is a name on the hub."""
    path = Path(text).expanduser()
    is_path = path.is_absolute() or text.startswith((".", "~")) or (folder / path).is_dir()
    return str((folder / path).resolve()) if is_path else text
