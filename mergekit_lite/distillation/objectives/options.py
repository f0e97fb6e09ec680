"""The options of objectives and distances: keyword arguments of their functions, checked by their annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from mergekit_lite.errors import nearest

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the keyword-only arguments of a function with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def checked(
    what: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    problems: list[str],
    more: Mapping[str, tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """Return all keyword arguments of a function; wrong names and values become ``problems``.

    Args:
        what: the options are of, as messages begin: "objective dpo".
        function: its keyword-only arguments are the options.
        given: those of a recipe.
        problems: gets the messages.
        more: options that the function doesn't have itself, with their type and default.
    """
    more = more or {}
    kinds = get_type_hints(function, include_extras=True) | {name: kind for name, (kind, _) in more.items()}
    options = defaults(function) | {name: default for name, (_, default) in more.items()}
    for name, value in given.items():
        if name not in options:
            known = f"It has {', '.join(options)}." if options else "It has none."
            problems.append(f"{what} has no option {name!r}.{nearest(name, options)} {known}")
            continue
        try:
            options[name] = TypeAdapter(kinds[name]).validate_python(value)
        except ValidationError as error:
            why = "; ".join(entry["msg"] for entry in error.errors())
            problems.append(f"{what}, option {name}: {why}, got {value!r}.")
    return options
