"""A merge recipe as data: validated, immutable, each part with its place in the text.

``models:`` is one slice with all layers of each model. Where a base model is an input of a slice it stands among the
slice's sources, at the end if the recipe doesn't list it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mergekit_lite.recipe.rules import NOWHERE, Filter, Parameters, Spot
from mergekit_lite.yaml_document import Mark, Remark


@dataclass(frozen=True)
class Source:
    """One model that goes into a slice.

    Attributes:
        model: its reference.
        layers: the first layer and the one behind the last, or None for all.
        parameters: for this model alone.
    """

    model: str
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    at: Mark = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class Slice:
    """A run of layers of the output, and what it is merged from.

    Attributes:
        sources: the inputs, in the order of the recipe.
        base: which of them is the base model, if one is.
        parameters: for this slice.
    """

    sources: tuple[Source, ...]
    base: int | None = None
    parameters: Parameters = field(default_factory=dict)
    at: Mark = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class Override:
    """Another method, or other parameters, for the tensors of a filter."""

    filter: Filter
    merge_method: str
    parameters: Parameters = field(default_factory=dict)
    at: Mark = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class MergeRecipe:
    """A merge as asked for.

    Attributes:
        merge_method: the method's name.
        slices: what the layers of the output are made of, from the first to the last.
        base_model: the reference of the base, if there is one.
        parameters: for all slices and models that say nothing else.
        overrides: the first one that matches a tensor decides.
        exclude: tensors that are copied from the base (or from the first model where there is none).
        dtype: the dtype of the output where ``out_dtype`` is None; None for that of the inputs.
        out_dtype: the dtype of the output, or None for ``dtype``.
        rounding: ``nearest`` or ``stochastic``.
        seed: of everything random.
        chat_template: ``auto``, the name of a template, or a template; None for the tokenizer's own.
        tokenizer: ``base``, or the model that gives the tokenizer; None for the donor.
        notes: what the user should know though it is no error.
    """

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    exclude: tuple[Filter, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    chat_template: str | None = None
    tokenizer: str | None = None
    notes: tuple[Remark, ...] = field(default=(), compare=False)
    at: Mark = field(default=NOWHERE, compare=False)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is read, once, in the order of the recipe; a base that is no input comes last."""
        listed = [source.model for part in self.slices for source in part.sources]
        return tuple(dict.fromkeys([*listed, *([self.base_model] if self.base_model else [])]))

    @property
    def donor(self) -> str:
        """The model that config, tokenizer and template come from: the base, else the first one listed."""
        return self.base_model or self.models[0]

    def excludes(self, spot: Spot) -> bool:
        """Whether a tensor is copied instead of merged."""
        return any(pattern.matches(spot) for pattern in self.exclude)

    def override_for(self, spot: Spot) -> Override | None:
        """The override that decides for a tensor."""
        return next((override for override in self.overrides if override.filter.matches(spot)), None)
