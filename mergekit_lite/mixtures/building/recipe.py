"""Recipes of mixtures: the language of mergekit-moe, made strict, with every problem told at its place.

base_model: org/base           # attention, norms, embedding and head; prompts go through it
gate_mode: hidden              # how the router's rows are made: see ``routers``; hidden is the default
dtype: bfloat16                # of the output; the base's by default
experts_per_token: 2           # how many experts each token goes through
architecture: mixtral          # the family; by default the first one that fits, Mixtral before others
seed: 0                        # of random rows and of noise; mergekit has none
experts:
  - source_model: org/math     # its MLPs are the expert's
    positive_prompts: [...]    # texts that are to go to it
    negative_prompts: [...]    # texts that are not
    noise_scale: 0.01          # standard deviation of noise that is added to its weights
    residual_scale: 0.5        # its down_proj times this
shared_experts: [...]          # experts that every token goes through
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from mergekit_lite.mixtures.building.dense import families_named, no_such_family
from mergekit_lite.recipe import values
from mergekit_lite.recipe.places import place
from mergekit_lite.recipe.rules import NOWHERE
from mergekit_lite.recipe.values import choice, fields, items
from mergekit_lite.yaml_document import Fields, Mark, Node, RecipeError, Remark, Scalar, describe, read

RANDOM = ("random", "uniform_random")
HIDDEN = ("hidden", "hidden_avg", "hidden_last")
GATE_MODES = (*HIDDEN, "cheap_embed", *RANDOM)
KEYS = ("base_model", "gate_mode", "dtype", "experts_per_token", "architecture", "experts", "shared_experts", "seed",
        "random_seed")  # fmt: skip
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
MERGE = "{} is a key of merges: this recipe builds a mixture of experts; merge it with mergekit-lite merge"
OTHERS = {key: MERGE.format(repr(key)) for key in ("merge_method", "models", "slices", "parameters")}
NEEDS = "base_model and experts"


@dataclass(frozen=True)
class Expert:
    """One expert: the model whose MLPs it has, and the prompts that its rows of the router are made of."""

    model: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    at: Mark = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class MixtureRecipe:
    """A mixture as asked for; keys as in the module's docstring."""

    base_model: str
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    gate_mode: str = "hidden"
    experts_per_token: int = 2
    dtype: str | None = None
    architecture: str | None = None
    seed: int = 0
    notes: tuple[Remark, ...] = field(default=(), compare=False)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Every model that is read, once; the base first."""
        return tuple(dict.fromkeys([self.base_model, *(each.model for each in (*self.experts, *self.shared))]))

    @property
    def are_equal(self) -> bool:
        """Whether all experts are the same."""
        made = {(each.model, each.residual_scale) for each in self.experts}
        return len(made) == 1 and not any(each.noise_scale for each in self.experts)


def parse(content: str, source: str = "The recipe", *, equal_experts: bool = False) -> MixtureRecipe:
    """Return the recipe in a YAML text.

    Args:
        content: the text.
        source: what messages call it.
        equal_experts: accept experts that are all the same.

    Raises:
        RecipeError: with every problem and its place.
    """
    root, problems, notes = read(content, source, NEEDS), list[Remark](), list[Remark]()
    parts = fields(root, "the recipe of a mixture", KEYS, problems, OTHERS)
    for key in ("base_model", "experts"):
        if key not in parts and isinstance(root, Fields):
            problems.append(Remark(root.at, f"the recipe has no {key!r}"))
    mode = choice(parts["gate_mode"], "gate_mode", GATE_MODES, problems) if "gate_mode" in parts else "hidden"
    recipe = MixtureRecipe(
        _reference(parts, "base_model", problems, notes),
        tuple(_expert(node, problems, notes) for node in items(parts.get("experts"), "experts", problems)),
        tuple(_expert(node, problems, notes) for node in _shared(parts, problems)),
        mode or "random",  # a misspelt one asks for no prompts
        _per_token(parts.get("experts_per_token"), problems),
        values.dtype(parts.get("dtype"), "dtype", problems),
        _architecture(parts.get("architecture"), problems),
        values.seed(parts, problems, notes),
    )
    recipe = _with_one_name_each(recipe)
    problems += _unsound(recipe, parts, equal_experts)
    if problems:
        raise RecipeError(source, problems)
    return replace(recipe, notes=(*notes, *_notes(recipe, parts, equal_experts)))


def _shared(parts: Mapping[str, Node], problems: list[Remark]) -> tuple[Node, ...]:
    """Return the entries of ``shared_experts``, which may be an empty list."""
    node = parts.get("shared_experts")
    is_empty = node is not None and not isinstance(node, Scalar | Fields) and not node.items
    return () if is_empty else items(node, "shared_experts", problems)


def _expert(node: Node, problems: list[Remark], notes: list[Remark]) -> Expert:
    parts = fields(node, "an expert", EXPERT_KEYS, problems)
    if "source_model" not in parts and isinstance(node, Fields):
        problems.append(Remark(node.at, "the expert has no 'source_model'"))
    return Expert(
        _reference(parts, "source_model", problems, notes),
        _prompts(parts.get("positive_prompts"), "positive_prompts", problems),
        _prompts(parts.get("negative_prompts"), "negative_prompts", problems),
        _number(parts.get("noise_scale"), "noise_scale", 0.0, 0.0, problems),
        _number(parts.get("residual_scale"), "residual_scale", 1.0, -math.inf, problems),
        node.at,
    )


def _architecture(node: Node | None, problems: list[Remark]) -> str | None:
    """Return what begins the name of a family that can be made; None where the key is missing."""
    name = values.text(node, "architecture", problems) if node is not None else ""
    if node is not None and name and not families_named(name):
        problems.append(Remark(node.at, no_such_family(name)))
    return name or None


def _reference(parts: Mapping[str, Node], name: str, problems: list[Remark], notes: list[Remark]) -> str:
    return values.reference(parts[name], name, problems, notes) if name in parts else ""


def _with_one_name_each(recipe: MixtureRecipe) -> MixtureRecipe:
    """Return the recipe with each model called what it was called first, however it is written elsewhere."""
    named: dict[str, str] = {}
    for model in recipe.models:
        named.setdefault(place(model), model)
    experts, shared = (
        tuple(replace(each, model=named[place(each.model)]) for each in listed)
        for listed in (recipe.experts, recipe.shared)
    )
    return replace(recipe, experts=experts, shared=shared)


def _prompts(node: Node | None, name: str, problems: list[Remark]) -> tuple[str, ...]:
    """Return a list of texts; an empty list is none, as in mergekit."""
    if node is None or (not isinstance(node, Scalar | Fields) and not node.items):
        return ()
    return tuple(values.text(entry, name, problems) for entry in items(node, name, problems))


def _number(node: Node | None, name: str, default: float, least: float, problems: list[Remark]) -> float:
    if node is None:
        return default
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least:
        return float(value)
    bound = f" from {least:g} on" if math.isfinite(least) else ""
    problems.append(Remark(node.at, f"{name!r} expects a number{bound}, got {describe(node)}"))
    return default


def _per_token(node: Node | None, problems: list[Remark]) -> int:
    if node is None:
        return 2
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    problems.append(Remark(node.at, f"'experts_per_token' expects a whole number from 1 on, got {describe(node)}"))
    return 1


def _unsound(recipe: MixtureRecipe, parts: Mapping[str, Node], equal_experts: bool) -> Iterator[Remark]:
    """Yield what doesn't fit together in a recipe."""
    if not recipe.experts:
        return
    at = parts["experts_per_token"].at if "experts_per_token" in parts else parts["experts"].at
    if recipe.experts_per_token > len(recipe.experts):
        counts = f"each token goes through {recipe.experts_per_token}, there are {len(recipe.experts)}"
        yield Remark(at, f"more experts per token than experts: {counts}")
    if recipe.are_equal and not equal_experts and recipe.gate_mode != "random":
        yield Remark(
            parts["experts"].at,
            "all experts are the same model: the mixture answers as that model, and takes more room. To train it "
            "further, mergekit-lite upcycle makes one with noise; or give --i-understand-this-is-not-useful-"
            "without-training",
        )
    if recipe.gate_mode in RANDOM:
        return
    for expert in recipe.experts:
        if not expert.positive:
            needs = f"the expert has no 'positive_prompts', which gate_mode {recipe.gate_mode} makes its router of"
            yield Remark(expert.at, needs)
    prompts = {(expert.positive, expert.negative) for expert in recipe.experts}
    if len(prompts) == 1 and len(recipe.experts) > 1 and recipe.experts[0].positive:
        yield Remark(
            parts["experts"].at,
            "the prompts of all experts are the same, so the router can't tell them apart: give each expert texts "
            "that are to go to it, or take gate_mode: random",
        )


def _notes(recipe: MixtureRecipe, parts: Mapping[str, Node], equal_experts: bool) -> Iterator[Remark]:
    """Yield what the user should know of a recipe that is sound."""
    everyone = (*recipe.experts, *recipe.shared)
    if recipe.gate_mode in RANDOM and any(each.positive or each.negative for each in everyone):
        yield Remark(parts["gate_mode"].at, f"gate_mode {recipe.gate_mode} draws its rows: the prompts have no effect")
    if recipe.are_equal and len(recipe.experts) > 1 and not equal_experts:  # else it was asked for
        yield Remark(parts["experts"].at, "all experts are the same model: useful only where it is trained further")
