"""The parameters of a method: kinds and ranges, read from its signature, and the values a user gives for them."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

from mergekit_lite.errors import UsageError, listing, nearest

Value: TypeAlias = float | int | bool | str

Each: TypeAlias = Literal["", "model", "input"]
EACH: tuple[Each, ...] = ("model", "input")

# What mergekit's recipes have and its methods don't use, with what to say about it.
NO_EFFECT = {
    "int8_mask": "int8_mask has no effect and is ignored",
    "residual_weight": "residual_weight has no effect, as in mergekit",
    "embed_slerp": "embed_slerp has no effect: mergekit doesn't read it any more",
}


@dataclass(frozen=True)
class Bounds:
    """The range of a number, for an annotation: from ``least`` to ``most``, both included."""

    least: float = -math.inf
    most: float = math.inf

    def __contains__(self, number: float) -> bool:
        """Return whether the number lies in the range."""
        return self.least <= number <= self.most

    def __str__(self) -> str:
        """Return `` from 0 to 1``: what follows ``a number`` in a message; nothing where every number will do."""
        if self.most < math.inf:
            return f" from {self.least:g} to {self.most:g}"
        return f" from {self.least:g} on" if self.least > -math.inf else ""


@dataclass(frozen=True)
class Doc:
    """What a parameter does, for an annotation that several methods share; else it stands in the method's Args."""

    text: str


Number = TypeVar("Number", bound=float)
PerModel = Annotated[tuple[Number, ...], "model"]  # a number for each model; a single one serves all
PerInput = Annotated[tuple[Number, ...], "input"]  # also one for the base, first, where there is a base
Share = Annotated[float, Bounds(0, 1)]
NotNegative = Annotated[float, Bounds(0)]
Count = Annotated[int, Bounds(0)]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: in a recipe; Python's may have an underscore behind it (``lambda_``).
        types: any of ``float``, ``int``, ``bool``, ``str``; of one value where there are several.
        default: where no value is given; None where it is ``required``.
        required: whether a value has to be given.
        choices: the texts that are allowed, where not all are.
        each: of what each has a value of its own: ``model``, ``input`` (the base is one of them), or "".
        bounds: of the number.
        about: from a ``Doc``, if there is one.
    """

    name: str
    types: tuple[type, ...] = (float,)
    default: Value | None = None
    required: bool = False
    choices: tuple[str, ...] = ()
    each: Each = ""
    bounds: Bounds = Bounds()
    about: str = ""

    @classmethod
    def of(cls, name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> Parameter:
        """Read an annotation, such as ``Share``, ``PerModel[Share]`` or ``bool | Literal['l1', 'density']``."""
        kind, marks = _unwrapped(annotation)
        each: Each = next((mark for mark in EACH if mark in marks), "")
        about = next((mark.text for mark in marks if isinstance(mark, Doc)), "")
        if each:
            kind, marks = _unwrapped(get_args(kind)[0])
            default = default[0] if isinstance(default, tuple) else default
        bounds = next((mark for mark in marks if isinstance(mark, Bounds)), Bounds())
        arms = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        choices = [choice for arm in arms if get_origin(arm) is Literal for choice in get_args(arm)]
        kinds = [arm for arm in arms if arm in (float, int, bool, str)] + [type(choice) for choice in choices]
        texts = tuple(choice for choice in choices if isinstance(choice, str))
        if not kinds:
            raise TypeError(f"{name}: no parameter of a method can be {annotation} (see methods/parameters.py)")
        required = default is inspect.Parameter.empty
        default = None if required else default
        return cls(name, tuple(dict.fromkeys(kinds)), default, required, texts, each, bounds, about)

    @property
    def expected(self) -> str:
        """``a number from 0 to 1``, ``true or false or one of 'l1', 'density'``: what a message asks for."""
        number = "a number" if float in self.types else "a whole number" if int in self.types else ""
        texts = f"one of {', '.join(map(repr, self.choices))}" if self.choices else "text"
        kinds = (
            f"{number}{self.bounds}" if number else "",
            "true or false" if bool in self.types else "",
            texts if str in self.types else "",
        )
        return " or ".join(filter(None, kinds))

    def objection(self, value: Value) -> str | None:
        """Return what is wrong with a value of the right type, or None."""
        if isinstance(value, bool | str) or value in self.bounds:
            return None
        return f"expected {self.expected}, got {value:g}"

    def checked(self, value: Any) -> Value:
        """Return one value in the parameter's type. Raises UsageError where it is of another type or out of bounds."""
        if isinstance(value, bool) and bool in self.types:
            return value
        if isinstance(value, str) and str in self.types and value in (self.choices or (value,)):
            return value
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if number and not math.isfinite(value):
            raise UsageError(f"expected a finite number, got {value!r}")
        if number and (float in self.types or (int in self.types and value == int(value))):
            if objection := self.objection(value):
                raise UsageError(objection)
            return float(value) if float in self.types else int(value)
        raise UsageError(f"expected {self.expected}, got {value!r}.{nearest(str(value), self.choices)}")

    def argument(self, given: Any, models: int, has_base: bool) -> Value | tuple[Value, ...]:
        """Return what the method's function gets: the value checked, and spread over the models where each has one.

        Raises:
            UsageError: a value doesn't fit, or there is not one for each model.
        """
        if not self.each:
            return self.checked(given)
        count = models + (has_base and self.each == "input")
        if not isinstance(given, Sequence) or isinstance(given, str):
            return (self.checked(given),) * count
        values = tuple(self.checked(single) for single in given)
        if len(values) not in (1, count):
            raise UsageError(f"expected one number or {count}, one for each {self.each}, got {len(values)}")
        return values * count if len(values) == 1 else values


@cache
def of_signature(function: Callable[..., Any]) -> Mapping[str, Parameter]:
    """Return the keyword parameters of a method's function by their names in a recipe."""
    return MappingProxyType({parameter.name: parameter for parameter in _keywords(function).values()})


def resolved(function: Callable[..., Any], given: Mapping[str, Any], models: int, has_base: bool) -> dict[str, Any]:
    """Return the keyword arguments for a method's function: given values checked and spread, else defaults.

    Raises:
        UsageError: names every parameter that is unknown, missing or of a value that doesn't fit.
    """
    method, known = function.__name__, of_signature(function)
    unknown = [name for name in given if name not in known and name not in NO_EFFECT]
    problems = [f"{method} has no parameter {name!r}.{nearest(name, known)}" for name in unknown]
    arguments: dict[str, Any] = {}
    for keyword, parameter in _keywords(function).items():
        if parameter.required and parameter.name not in given:
            problems.append(f"{method} needs the parameter {parameter.name!r}")
            continue
        try:
            arguments[keyword] = parameter.argument(given.get(parameter.name, parameter.default), models, has_base)
        except UsageError as problem:
            problems.append(f"{parameter.name}: {problem}")
    if problems:
        raise UsageError(listing(f"{method} can't be run with these parameters", problems))
    return arguments


@cache
def _keywords(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the keyword parameters by their names in Python."""
    return {
        name: Parameter.of(name.rstrip("_"), parameter.annotation, parameter.default)
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _unwrapped(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return what ``Annotated`` is put around, and what is noted about it."""
    if get_origin(annotation) is not Annotated:
        return annotation, ()
    kind, *marks = get_args(annotation)
    return kind, tuple(marks)
