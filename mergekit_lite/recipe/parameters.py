"""What a merge method takes, as far as a recipe is concerned.

The recipe language knows no method by name. It is handed a table of these, made from the methods' signatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mergekit_lite.methods.parameters import Parameter

Base = Literal["required", "optional", "none"]

__all__ = ["Base", "MethodParameters", "Parameter"]


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
