"""Options of the public functions: the choices they have, and the refusal of one that is misspelt."""

from __future__ import annotations

import inspect
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


def named_options(function: Callable[P, T]) -> Callable[P, T]:
    """Make a public function refuse an option that it doesn't take by naming the nearest one that it does.

    Python's own TypeError would name an inner function wherever options are passed on, and no remedy.
    """
    known = _options_of(function)

    @wraps(function)
    def checked(*arguments: P.args, **options: P.kwargs) -> T:
        for name in options:
            if name not in known:
                raise UsageError(f"{function.__name__}() has no option {name!r}.{nearest(name, known)}")
        return function(*arguments, **options)

    return checked


def _options_of(function: Callable[..., object]) -> list[str]:
    """Return the names that a function takes by keyword, those of an unpacked TypedDict included."""
    names: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names.append(name)
        elif unpacked := UNPACKED.fullmatch(str(parameter.annotation)):
            names += function.__globals__[unpacked[1]].__annotations__
    return names
