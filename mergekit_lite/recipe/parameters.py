"""What a merge method takes, as far as a recipe is concerned.

The recipe language knows no method by name. It is handed a table of these, made from the methods' signatures.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from mergekit_lite.yaml_document import Value

Base = Literal["required", "optional", "none"]


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        types: any of ``float``, ``int``, ``bool``, ``str``.
        default: where the recipe gives no value.
        required: the recipe must give a value.
        choices: the texts that are allowed, where not all are.
        objection: what the method has against a value of the right type, or None.
    """

    types: tuple[type, ...] = (float,)
    default: Value | None = None
    required: bool = False
    choices: tuple[str, ...] = ()
    objection: Callable[[Value], str | None] = field(default=lambda value: None, compare=False, repr=False)

    @classmethod
    def of(cls, hint: Any, default: Any = inspect.Parameter.empty) -> Parameter:
        """From a type hint (``float``, ``bool | Literal['l1', 'density']``, ``float | None`` …) and a default."""
        arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        choices = [choice for arm in arms if get_origin(arm) is Literal for choice in get_args(arm)]
        kinds = [arm for arm in arms if arm in (float, int, bool, str)] + [type(choice) for choice in choices]
        required = default is inspect.Parameter.empty
        texts = tuple(choice for choice in choices if isinstance(choice, str))
        return cls(tuple(dict.fromkeys(kinds)), None if required else default, required, texts)

    @property
    def expected(self) -> str:
        """``a number``, ``true or false``: what a message asks for."""
        texts = [f"one of {', '.join(map(repr, self.choices))}"] if self.choices else ["text"]
        number = ["a number"] if float in self.types else ["a whole number"] if int in self.types else []
        truth = ["true or false"] if bool in self.types else []
        return " or ".join([*number, *truth, *(texts if str in self.types else [])])


@dataclass(frozen=True)
class MethodParameters:
    """What a method takes.

    Attributes:
        shared: parameters with one value for all models.
        per_model: parameters with a value for each model that is merged.
        base: whether the method has use for a base model. ``none``: a base model is merged like any other.
        models: the least and the most models (None: any number), not counting the base where it has a use.
    """

    shared: Mapping[str, Parameter] = field(default_factory=dict)
    per_model: Mapping[str, Parameter] = field(default_factory=dict)
    base: Base = "required"
    models: tuple[int, int | None] = (1, None)

    @property
    def all(self) -> dict[str, Parameter]:
        """Both kinds."""
        return {**self.shared, **self.per_model}

    def counts(self, number: int) -> bool:
        """Whether it can merge this many."""
        least, most = self.models
        return number >= least and (most is None or number <= most)

    @property
    def expected(self) -> str:
        """``exactly 2 models``, ``2 or more models besides base_model``."""
        least, most = self.models
        number = f"exactly {least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        noun = "model" if least == most == 1 else "models"
        return f"{number} {noun}{'' if self.base == 'none' else ' besides base_model'}"
