"""A recipe as data: what the user wants, validated and immutable, each part with its place in the text.

A YAML text (``schema.parse``), the command ``extrapolate`` and Python all make the same ``Recipe``.

``models:`` is one slice with all layers of each model. Where a base model is an input of a slice it stands among the
slice's sources, at the end if the recipe doesn't list it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from mergekit_lite import block_fp8, dtypes
from mergekit_lite.errors import UsageError, listing, nearest
from mergekit_lite.methods import METHODS
from mergekit_lite.recipe.rules import NOWHERE, Filter, Parameters, Spot, joined
from mergekit_lite.recipe.templates import TEMPLATES
from mergekit_lite.rounding import ROUNDINGS
from mergekit_lite.yaml_document import Mark, Remark

NEW_ROWS = ("refuse", "copy")
BACKBONES = ("all", "only")
WIDTHS = ("base", "max", "min")
ALIGNMENTS = ("strings",)  # what tokens are matched by: their texts
BASE, UNION = "base", "union"  # as a tokenizer: that of the base model; that which all models have
KNOWN_TEMPLATES = ("auto", *TEMPLATES)
SHORTEST_TEMPLATE = 20  # characters


@dataclass(frozen=True)
class Source:
    """One model that goes into a slice."""

    model: str  # its reference
    layers: tuple[int, int] | None = None  # the first layer and the one behind the last, or None for all
    parameters: Parameters = field(default_factory=dict)  # for this model alone
    statistics: str | None = None  # the file of what was gathered of it on prompts
    at: Mark = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class Slice:
    """A run of layers of the output, and what it is merged from."""

    sources: tuple[Source, ...]  # the inputs, in the order of the recipe
    base: int | None = None  # which of them is the base model, if one is
    parameters: Parameters = field(default_factory=dict)  # for this slice
    at: Mark = field(default=NOWHERE, compare=False)

    @property
    def is_whole(self) -> bool:
        """Whether all layers of each model go in."""
        return all(source.layers is None for source in self.sources)

    @property
    def is_base_alone(self) -> bool:
        """Whether nothing goes in but the base: a sum of no deltas, which is the base itself."""
        return len(self.sources) == 1 and self.base == 0

    @property
    def uneven(self) -> str | None:
        """A message where the sources have ranges of different lengths, else None."""
        ranges = [(source.model, source.layers) for source in self.sources if source.layers is not None]
        if len({end - start for _, (start, end) in ranges}) <= 1:
            return None
        listed = ", ".join(f"{model} [{start}, {end}]" for model, (start, end) in ranges)
        return f"all sources of a slice have the same number of layers, got {listed}"


@dataclass(frozen=True)
class Module:
    """A part of the model that slices of its own make: mergekit's name of it, or what its tensors' names begin with."""

    name: str
    slices: int  # how many of the recipe's slices are its own; those of one module come behind those of another
    at: Mark = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class Override:
    """Another method, or other parameters, for the tensors of a filter."""

    filter: Filter
    merge_method: str
    parameters: Parameters = field(default_factory=dict)
    at: Mark = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class TokenRow:
    """Where models that lack a token have its row from, or all models where it is ``force``d.

    A model's row of the token ``other``, or of the same token, or its row of a ``number``; ``zero``; or, of none of
    these, the default.
    """

    token: str
    model: str | None = None
    other: str | None = None
    number: int | None = None
    zero: bool = False
    force: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the output's vocabulary: what single tokens get, and how many rows there are.

    ``width`` is that of the model that gives the tokenizer (``base``), or the ``max`` or ``min`` of all models; or the
    tokens are padded to a multiple.
    """

    tokens: tuple[TokenRow, ...] = ()
    width: str = "base"
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A merge as asked for.

    Attributes:
        merge_method: the method's name.
        slices: what the layers of the output are made of, from the first to the last; or those of each module.
        modules: the parts of the output that are made by slices of their own; empty for the whole model.
        base_model: the reference of the base, if there is one.
        parameters: for all slices and models that say nothing else.
        outputs: where several outputs are made in one pass over the inputs, the parameters of each, which go before
            ``parameters``; empty for one output.
        overrides: the first one that matches a tensor decides.
        include: tensors that are merged, all others are copied; empty for all.
        exclude: tensors that are copied. Copies come from the model that gives config and tokenizer.
        dtype: the dtype of the output where ``out_dtype`` is None; None for that of the inputs.
        out_dtype: the dtype of the output, or ``fp8``, or None for ``dtype``.
        rounding: ``nearest`` or ``stochastic``.
        seed: of everything random.
        new_rows: ``refuse``, or ``copy`` to take rows over that only the vocabulary of the model that gives the config
            has; for methods that continue that model (``expo``).
        backbone: ``only`` to merge what lies between embedding and head, and copy those; or ``all``.
        chat_template: ``auto``, the name of a template, or a template; None for the tokenizer's own.
        tokenizer: ``base``, or the model that gives the tokenizer; ``union`` for one that has the tokens of all; None
            for that of the model that gives the config.
        vocabulary: where a tokenizer is asked for: what single tokens get, and how many rows there are.
        notes: what the user should know though it is no error.
        lists_run: whether models are the checkpoints that were found of a run: its text would find others later.

    Raises:
        UsageError: a value is none of those above, or a filter is no regular expression; every problem is named.
    """

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)
    outputs: tuple[Parameters, ...] = ()
    modules: tuple[Module, ...] = ()
    overrides: tuple[Override, ...] = ()
    include: tuple[Filter, ...] = ()
    exclude: tuple[Filter, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    new_rows: str = "refuse"
    backbone: str = "all"
    chat_template: str | None = None
    tokenizer: str | None = None
    vocabulary: Vocabulary = Vocabulary()
    notes: tuple[Remark, ...] = field(default=(), compare=False)
    lists_run: bool = field(default=False, compare=False)
    at: Mark = field(default=NOWHERE, compare=False)

    def __post_init__(self) -> None:
        if problems := list(dict.fromkeys(_problems(self))):
            raise UsageError(listing("The recipe is wrong", problems) if len(problems) > 1 else problems[0])

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is read, once, in the order of the recipe; a base that is no input comes last."""
        listed = [source.model for part in self.slices for source in part.sources]
        return tuple(dict.fromkeys([*listed, *([self.base_model] if self.base_model else [])]))

    @property
    def statistics(self) -> tuple[str, ...]:
        """Every file of statistics that is read, once."""
        named = (source.statistics for part in self.slices for source in part.sources)
        return tuple(dict.fromkeys(each for each in named if each is not None))

    @property
    def config_source(self) -> str:
        """The model that gives config and tokenizer: the base, else the first one; the one that ExPO continues."""
        if METHODS[self.merge_method].config_source == "model":
            return next((model for model in self.models if model != self.base_model), self.models[0])
        return self.base_model or self.models[0]

    @property
    def for_outputs(self) -> tuple[Recipe, ...]:
        """A recipe for each output alone."""
        alone = [replace(self, parameters=joined(own, self.parameters), outputs=()) for own in self.outputs]
        return tuple(alone) or (self,)

    @property
    def levels(self) -> Iterator[Parameters]:
        """Every mapping of parameters in the recipe."""
        yield self.parameters
        yield from self.outputs
        for part in self.slices:
            yield part.parameters
            yield from (source.parameters for source in part.sources)
        yield from (override.parameters for override in self.overrides)

    @property
    def filters(self) -> Iterator[Filter]:
        """Every filter in the recipe."""
        yield from (*self.include, *self.exclude, *(override.filter for override in self.overrides))
        for parameters in self.levels:
            yield from (rule.filter for rules in parameters.values() for rule in rules)

    def why_copied(self, spot: Spot) -> str:
        """Return why a tensor is copied instead of merged; empty where it is merged."""
        if spot not in self._copied:
            self._copied[spot] = self._why_copied(spot)
        return self._copied[spot]

    def _why_copied(self, spot: Spot) -> str:
        if self.include and not any(pattern.matches(spot) for pattern in self.include):
            return "not included"
        return "excluded" if any(pattern.matches(spot) for pattern in self.exclude) else ""

    @cached_property
    def _copied(self) -> dict[Spot, str]:
        """What ``why_copied`` returned before: of many filters it takes long, and it is asked several times."""
        return {}

    def override_for(self, spot: Spot) -> Override | None:
        """Return the override that decides for a tensor."""
        return next((override for override in self.overrides if override.filter.matches(spot)), None)


def is_template(text: str) -> bool:
    """Return whether a text is ``auto``, the name of a chat template, or may be a template itself."""
    return text in KNOWN_TEMPLATES or ("{" in text and len(text) >= SHORTEST_TEMPLATE)


def _problems(recipe: Recipe) -> Iterator[str]:
    for part in recipe.slices:
        if part.base is not None and not 0 <= part.base < len(part.sources):
            yield f"base is {part.base}: it is the number of one of the slice's {len(part.sources)} sources."
    for name, value, known in (
        ("rounding", recipe.rounding, ROUNDINGS),
        ("new_rows", recipe.new_rows, NEW_ROWS),
        ("backbone", recipe.backbone, BACKBONES),
        ("dtype", recipe.dtype, (None, *dtypes.FLOATS)),
        ("out_dtype", recipe.out_dtype, (None, *dtypes.OUTPUTS)),
        ("width", recipe.vocabulary.width, WIDTHS),
        ("tokenizer", recipe.tokenizer, (None, BASE, UNION, *recipe.models)),
    ):
        if value not in known:
            yield _unknown(name, value, known)
    if recipe.out_dtype == block_fp8.NAME and recipe.rounding != "nearest":
        yield f"rounding is {recipe.rounding}, but fp8 is rounded to nearest."
    if recipe.tokenizer is None and recipe.vocabulary != Vocabulary():
        yield "width and single tokens' rows are for a tokenizer that is asked for: give tokenizer_source."
    if isinstance(recipe.seed, bool) or not isinstance(recipe.seed, int) or recipe.seed < 0:
        yield f"seed expects a whole number from 0 on, got {recipe.seed!r}."
    if recipe.chat_template is not None and not is_template(recipe.chat_template):
        yield _unknown("chat_template", recipe.chat_template, (*KNOWN_TEMPLATES, "a Jinja template"))
    ranges = [source.layers for part in recipe.slices for source in part.sources]
    for filter_ in recipe.filters:
        ranges.append(filter_.layers)
        try:
            filter_.pattern  # noqa: B018  (compiled here)
        except re.error as error:
            yield f"{filter_.expression!r} is not a regular expression: {error}."
    yield from (
        f"layers expect two whole numbers, the first from 0 on and less than the end, got {layers!r}."
        for layers in ranges
        if layers is not None and not 0 <= layers[0] < layers[1]
    )
    for parameters in recipe.levels:
        yield from (f"{name} has no value." for name, rules in parameters.items() for rule in rules if not rule.values)


def _unknown(name: str, value: object, known: tuple[str | None, ...]) -> str:
    names = [text for text in known if text is not None]
    return f"{name} expects one of {', '.join(names)}, got {value!r}.{nearest(str(value), names)}"
