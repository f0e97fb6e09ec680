"""What the user wants: models, a method, its numbers for every tensor, and how to write the result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.errors import UsageError

NEW_ROWS = ("refuse", "copy")


@dataclass(frozen=True)
class Setting:
    """A parameter's value for every tensor: the first rule whose pattern is in the tensor's name, else the default."""

    default: float
    rules: tuple[tuple[str, float], ...] = ()

    def value(self, tensor: str) -> float:
        """The value for one tensor."""
        return next((value for pattern, value in self.rules if re.search(pattern, tensor)), self.default)


@dataclass(frozen=True)
class Recipe:
    """A merge as asked for.

    Attributes:
        merge_method: the method's name.
        models: references in the order of the method's inputs. The first one gives the output its tensors, shards,
            config and tokenizer.
        variants: the method's parameters, once for each output; all outputs are made in one pass over the inputs.
        include, exclude: regular expressions; a tensor that is not included, or is excluded, is copied from the first
            model.
        out_dtype: the dtype of all float tensors, or None for each as in the first model.
        rounding: ``nearest`` or ``stochastic``.
        seed: of everything random.
        new_rows: ``refuse``, or ``copy`` to take rows that only the first model's vocabulary has from there.
        shard_size: most bytes of data in one output file, or None for the shards of the first model.
    """

    merge_method: str
    models: tuple[str, ...]
    variants: tuple[Mapping[str, Setting], ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    out_dtype: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    new_rows: str = "refuse"
    shard_size: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the models."""
        patterns = [*self.include, *self.exclude]
        patterns += [
            pattern for variant in self.variants for setting in variant.values() for pattern, _ in setting.rules
        ]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"{pattern!r} is not a regular expression: {error}.") from error
        if self.out_dtype is not None and self.out_dtype not in dtypes.FLOATS:
            raise UsageError(f"Unknown output dtype {self.out_dtype!r}: expected one of {', '.join(dtypes.FLOATS)}.")

    def as_data(self, variant: int) -> dict[str, Any]:
        """One variant as a mergekit-like recipe, for the manifest and the model card."""
        parameters: dict[str, Any] = {}
        for name, setting in self.variants[variant].items():
            rules = [{"filter": f"regex:{pattern}", "value": value} for pattern, value in setting.rules]
            parameters[name] = [*rules, {"value": setting.default}] if rules else setting.default
        data: dict[str, Any] = {
            "merge_method": self.merge_method,
            "base_model": self.models[-1],
            "models": [{"model": model} for model in self.models[:-1]],
            "parameters": parameters,
        }
        extras: dict[str, Any] = {
            "include": list(self.include),
            "exclude": list(self.exclude),
            "out_dtype": self.out_dtype,
        }
        if self.rounding != "nearest":
            extras |= {"rounding": self.rounding, "seed": self.seed}
        if self.new_rows != "refuse":
            extras["new_rows"] = self.new_rows
        return data | {name: value for name, value in extras.items() if value}

    @property
    def patterns(self) -> list[str]:
        """Every regular expression in the recipe, once."""
        of_rules = [
            pattern for variant in self.variants for setting in variant.values() for pattern, _ in setting.rules
        ]
        return list(dict.fromkeys([*self.include, *self.exclude, *of_rules]))

    def selects(self, tensor: str) -> bool:
        """Whether a tensor goes through the method."""
        included = not self.include or any(re.search(pattern, tensor) for pattern in self.include)
        return included and not any(re.search(pattern, tensor) for pattern in self.exclude)
