"""A YAML tree as a pydantic model, or all that is wrong with it, each with line and column."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mergekit_lite.answers.problems import KeyPath, Problem
from mergekit_lite.errors import nearest
from mergekit_lite.yaml_document import Fields, Items, Mark, Node, RecipeError, Remark, Scalar, describe, read

M = TypeVar("M", bound=BaseModel)
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


def validated(
    kind: type[M],
    content: str,
    source: str,
    needs: str,
    contradictions: Callable[[M], Iterable[Problem]],
    completed: Callable[[dict[str, Any]], None] = lambda data: None,
) -> M:
    """Return the model of a recipe's text.

    Args:
        kind: the class of the model.
        content: the text.
        source: where it is from, for messages.
        needs: the keys that a recipe needs, in words.
        contradictions: yields what no single key shows.
        completed: puts into the data what users leave out.

    Raises:
        RecipeError: with every problem, its line and column.
    """
    root = read(content, source, needs)
    if not isinstance(root, Fields):
        raise RecipeError(source, [Remark(root.at, f"a recipe is a mapping with {needs}, got {describe(root)}")])
    problems: list[Remark] = []
    data = _plain(root, problems)
    completed(data)
    try:
        # From JSON, as strict validation of Python objects takes no list for a tuple and no text for a path.
        recipe = kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _described(kind, root, error)
    if not problems:
        problems = [Remark(_place(root, problem.at).node.at, problem.text) for problem in contradictions(recipe)]
    if problems:
        raise RecipeError(source, problems)
    return recipe


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
        if isinstance(node, Fields) and isinstance(step, int):  # one thing in the place of a list of one
            continue
        entry = next((e for e in node.entries if e[0].text == step), None) if isinstance(node, Fields) else None
        if entry is None:
            break
        key, node = entry
    return _Place(node, key)


def _described(kind: type[BaseModel], root: Node, error: ValidationError) -> Iterator[Remark]:
    """Yield pydantic's errors as remarks. A value that fits none of several types is one remark with all of them."""
    expected: dict[tuple[Mark, str], list[str]] = {}
    for details in error.errors(include_url=False, include_context=True):
        at, subject, expectation = _remark(kind, root, details)
        expected.setdefault((at, subject), []).append(expectation)
    for (at, subject), expectations in expected.items():
        yield Remark(at, subject + ", or ".join(dict.fromkeys(expectations)))


def _remark(kind: type[BaseModel], root: Node, details: ErrorDetails) -> tuple[Mark, str, str]:
    """Return where one of pydantic's errors is, its subject with what was got, and what was expected or a hint."""
    path = tuple(step for step in details["loc"] if not str(step).startswith("("))  # of unions' tags, which are no keys
    place = _place(root, path)
    name = str(place.key.text) if place.key else "an entry" if place.node is not root else "the recipe"
    if details["type"] == "extra_forbidden":
        key = str(path[-1])
        known = _known(kind, path[:-1])
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


def _known(kind: Any, path: KeyPath) -> list[str]:
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
        parts = [_bare(part) for part in get_args(annotation) if part is not type(None)]
        return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), parts[0])
    return annotation
