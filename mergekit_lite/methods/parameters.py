"""The parameters of a method: their kinds, read from its signature, and the values a user gives for them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

from mergekit_lite.errors import UsageError, listing, nearest

PerModel = Annotated[tuple[float, ...], "model"]  # a number for each model; a single one serves all
PerInput = Annotated[tuple[float, ...], "input"]  # the same, and one for the base, first, where there is one


@cache
def of_signature(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The keyword parameters by their names in a recipe: a trailing underscore (``lambda_``) is Python's need only."""
    known: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            kind = parameter.annotation  # a text, as inspect leaves it: evaluating all of them would import torch
            kind = eval(kind, function.__globals__) if isinstance(kind, str) else kind
            known[name.rstrip("_")] = parameter.replace(annotation=kind)
    return MappingProxyType(known)


def resolved(
    method: str, known: Mapping[str, inspect.Parameter], given: Mapping[str, Any], models: int, has_base: bool
) -> dict[str, Any]:
    """The keyword arguments for a method's function: given values checked and spread over the models, else defaults.

    Raises:
        UsageError: every parameter that is unknown, missing or of the wrong kind.
    """
    problems = [f"{method} has no parameter {name!r}.{nearest(name, known)}" for name in given if name not in known]
    arguments: dict[str, Any] = {}
    for name, parameter in known.items():
        value = given.get(name, parameter.default)
        if value is inspect.Parameter.empty:
            problems.append(f"{method} needs the parameter {name!r}")
            continue
        try:
            arguments[parameter.name] = _of_kind(parameter.annotation, value, models, has_base)
        except UsageError as problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise UsageError(listing(f"{method} can't be run with these parameters", problems))
    return arguments


def _of_kind(kind: Any, value: Any, models: int, has_base: bool) -> Any:
    if get_origin(kind) is Annotated:
        each = get_args(kind)[1]
        return _spread(value, models + (has_base and each == "input"), each)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
            words = [choice for choice in choices if isinstance(choice, str)]
            raise UsageError(
                f"expected one of {', '.join(map(str, choices))}, got {value!r}.{nearest(str(value), words)}"
            )
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise UsageError(f"expected true or false, got {value!r}")
        return value
    number = _number(value)
    if kind is int:
        if number != int(number):
            raise UsageError(f"expected a whole number, got {value!r}")
        return int(number)
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"expected a finite number, got {value!r}")
    return float(value)


def _spread(value: Any, count: int, each: str) -> tuple[float, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = tuple(_number(single) for single in value)
        if len(numbers) == 1:
            return numbers * count
        if len(numbers) != count:
            raise UsageError(f"expected one number or {count}, one for each {each}, got {len(numbers)}")
        return numbers
    return (_number(value),) * count
