"""The methods by name: a dictionary, and the decorator that fills it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mergekit_lite.errors import UsageError, nearest

METHODS: dict[str, Method] = {}


@dataclass(frozen=True)
class Method:
    """One merge method.

    Attributes:
        name: as written in a recipe.
        function: tensors of one block (flat, same length, same dtype) and keyword parameters in, merged block out.
        formula: one line for listings.
        source: the paper.
        rounds_once: the function computes 16-bit inputs in float32 inside and rounds its result once, so it can be
            given them as they are.
        observe: optional; (merged block, *inputs) in, the sums the report is made of out. Called on a fixed sample of
            blocks.
    """

    name: str
    function: Callable[..., Any]
    formula: str
    source: str
    rounds_once: bool = False
    observe: Callable[..., tuple[float, ...]] | None = None

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword parameters with their types and defaults, from the signature."""
        signature = inspect.signature(self.function)
        return {name: p for name, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def method(**about: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the method of its name; ``about`` gives the other fields of ``Method``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        METHODS[function.__name__] = Method(function.__name__, function, **about)
        return function

    return register


def method_named(name: str) -> Method:
    """Look a method up. Raises UsageError with the nearest name where there is none."""
    if name not in METHODS:
        raise UsageError(f"Unknown method {name!r}.{nearest(name, METHODS)} Known: {', '.join(sorted(METHODS))}.")
    return METHODS[name]
