"""The methods by name: a dictionary, and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from mergekit_lite.errors import UsageError, nearest
from mergekit_lite.methods import parameters
from mergekit_lite.methods.parameters import Parameter
from mergekit_lite.ops.operations import Figures

METHODS: dict[str, Method] = {}

Given = Literal["run", "fine-tunes", "models", "data"]
GIVEN: Mapping[Given, str] = {  # what a user has, by which lists of methods are grouped; the order is theirs
    "run": "checkpoints of one training run",
    "fine-tunes": "fine-tunes of one base",
    "models": "models of one shape, with a base in common or not",
    "data": "fine-tunes of one base, and data of their tasks",
}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """One merge method.

    Attributes:
        name: as written in a recipe.
        function: ``(info, **parameters)`` to what merges a block, or to the steps that lead there (see ``contract``).
        formula: one line for listings.
        source: the paper.
        given: what a user has who takes it, a key of ``GIVEN``.
        base: whether a base is ``required``, ``optional`` or must be ``none``.
        models: the fewest and the most models without the base; None for any number.
        rows: None where a tensor may be cut anywhere and blocks are 1-D. Else a function of shape and parameters that
            gives the length of a row: blocks are then whole rows, of shape (rows, that length); 0 cuts anywhere.
        config_source: which input gives config and tokenizer: the ``base`` where there is one, or the first ``model``.
        observed: optional; the figures the report is made of: of a fixed sample of merged blocks, each followed by its
            inputs.
        statistics: the kind of statistics that each model needs beside it, if any: ``gram`` or ``fisher``.
        prefixed: whether these are of text that came through merged layers, which is gathered for a whole recipe.
        check: optional; raises UsageError where the arguments don't go together, each of them being in its range.
    """

    name: str
    function: Callable[..., Any]
    formula: str
    source: str
    given: Given
    base: Literal["required", "optional", "none"] = "required"
    models: tuple[int, int | None] = (1, None)
    rows: Callable[..., int] | None = None
    config_source: Literal["base", "model"] = "base"
    observed: Figures | None = None
    statistics: Literal["", "gram", "fisher"] = ""
    prefixed: bool = False
    check: Callable[..., object] | None = None

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters by their names in a recipe."""
        return parameters.of_signature(self.function)

    @cached_property
    def merges_base(self) -> bool:
        """Whether a base is merged like any other model, with numbers of its own."""
        return self.base == "none" or any(parameter.each == "input" for parameter in self.parameters.values())

    @property
    def gathered_by(self) -> str:
        """The command that writes the statistics that it needs."""
        if self.prefixed:
            return "mergekit-lite statistics RECIPE --plus --prompts MODEL=FILE"
        return f"mergekit-lite statistics MODEL --prompts FILE{' --fisher' * (self.statistics == 'fisher')} -o OUT"

    @property
    def number(self) -> str:
        """``2``, ``2 or more`` or ``2 to 4``: how many models it merges, without the base."""
        fewest, most = self.models
        return str(fewest) if most == fewest else f"{fewest} or more" if most is None else f"{fewest} to {most}"

    @property
    def expected(self) -> str:
        """``exactly 2 models``, ``2 or more models besides base_model``: what a message asks for."""
        fewest, most = self.models
        number = f"exactly {fewest}" if most == fewest else self.number
        noun = "model" if fewest == most == 1 else "models"
        return f"{number} {noun}{'' if self.merges_base else ' besides base_model'}"

    def counts(self, models: int) -> bool:
        """Return whether the method can merge this many models, not counting a base that it doesn't merge."""
        fewest, most = self.models
        return models >= fewest and (most is None or models <= most)

    def resolve(self, given: Mapping[str, Any], models: int, has_base: bool) -> dict[str, Any]:
        """Return the keyword arguments for this many inputs, from what a user gave.

        Raises:
            UsageError: the method takes another number of inputs, these are not its parameters, or their values are
                out of range or don't go together.
        """
        if self.base == "required" and not has_base:
            raise UsageError(f"{self.name} needs a base: give it a base_model.")
        if self.base == "none" and has_base:
            raise UsageError(f"{self.name} has no use for a base: list it among the models, or leave it out.")
        if not self.counts(models):
            noun = "model" if self.number == "1" else "models"
            beside = " beside the base" if has_base else ""
            raise UsageError(f"{self.name} merges {self.number} {noun}{beside}, got {models}.")
        arguments = parameters.resolved(self.function, given, models, has_base)
        if self.check is not None:
            self.check(**arguments)
        return arguments


def method(**about: Any) -> Callable[[F], F]:
    """Register a function as the method of its name; ``about`` gives the other fields of ``Method``."""

    def register(function: F) -> F:
        METHODS[function.__name__] = Method(function.__name__, function, **about)
        return function

    return register


def method_named(name: str) -> Method:
    """Look a method up. Raises UsageError with the nearest name where there is none."""
    if name not in METHODS:
        raise UsageError(f"Unknown method {name!r}.{nearest(name, METHODS)} Known: {', '.join(sorted(METHODS))}.")
    return METHODS[name]


def last_axis(shape: tuple[int, ...], **_: Any) -> int:
    """Return the length of rows along the last axis; a vector is one row."""
    return shape[-1] if shape else 1
