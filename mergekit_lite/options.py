"""Options of the public functions: the choices they have, and the refusal of what is misspelt or no number."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

from mergekit_lite.errors import UsageError, nearest

P = ParamSpec("P")
T = TypeVar("T")
UNPACKED = re.compile(r"Unpack\[(\w+)\]")

Rounding = Literal["nearest", "stochastic"]
NewRows = Literal["refuse", "copy"]
Width = Literal["base", "max", "min"]


def named_options(function: Callable[P, T]) -> Callable[P, T]:
    """Make a public function refuse an option that it doesn't take by naming the nearest one that it does.

    Python's own TypeError would name an inner function wherever options are passed on, and no remedy.
    """
    known: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            known.append(parameter.name)
        elif unpacked := UNPACKED.fullmatch(str(parameter.annotation)):  # the keys of a TypedDict
            known += function.__globals__[unpacked[1]].__annotations__

    @wraps(function)
    def checked(*arguments: P.args, **options: P.kwargs) -> T:
        for name in options:
            if name not in known:
                raise UsageError(f"{function.__name__}() has no option {name!r}.{nearest(name, known)}")
        return function(*arguments, **options)

    return checked


def finite_number(value: float, name: str = "alpha") -> float:
    """Return a number as a float. Raises UsageError where it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} expects finite numbers, got {value!r}.")
    return float(value)
