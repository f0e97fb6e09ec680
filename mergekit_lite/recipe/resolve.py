"""The method and the numbers of every tensor.

A parameter's value comes from the first of these levels in which a rule matches the tensor: the override, the model
(for parameters that each model has), the slice, the recipe, the method's default. What models have each for themselves
is looked up by the name and layer of *that model's* tensor, all else by those of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mergekit_lite.errors import first_of
from mergekit_lite.methods import METHODS
from mergekit_lite.methods.parameters import Parameter
from mergekit_lite.recipe.layers import Output
from mergekit_lite.recipe.recipe import Recipe
from mergekit_lite.recipe.rules import Filter, Parameters, Spot, along, rule_for
from mergekit_lite.yaml_document import Remark, Value


class Numbers(NamedTuple):
    """The method and the values that one tensor is made with."""

    merge_method: str
    shared: Mapping[str, Value | None]  # what holds for all models
    per_model: tuple[Mapping[str, Value | None], ...]  # by the output's inputs; empty for a base that isn't merged


class Resolved(NamedTuple):
    """Numbers for each output (None: it is copied), what is wrong, and what the user should know."""

    numbers: tuple[Numbers | None, ...]
    problems: tuple[str, ...]
    notes: tuple[Remark, ...]


def resolve(recipe: Recipe, outputs: Sequence[Output]) -> Resolved:
    """Return the numbers of all tensors of a recipe, which are from ``layers.outputs``."""
    resolving = _Resolving(recipe, tuple(_filters(recipe)))
    numbers = tuple(None if recipe.why_copied(output.spot) else resolving.numbers(output) for output in outputs)
    spots = [output.spot for output in outputs]
    return Resolved(numbers, tuple(resolving.problems()), tuple(sorted(_idle(recipe, resolving.used, spots))))


@dataclass
class _Resolving:
    """Tensors for which the same filters match, at the same point of the gradients, share their numbers."""

    recipe: Recipe
    filters: tuple[Filter, ...]
    used: set[int] = field(default_factory=set)  # rules that decided something, by identity
    wrong: dict[str, list[str]] = field(default_factory=dict)  # problem: the tensors that have it
    known: dict[object, tuple[Numbers, tuple[str, ...]]] = field(default_factory=dict)  # with what is wrong about them

    def __post_init__(self) -> None:
        rules = [rule for parameters in self.recipe.levels for of_name in parameters.values() for rule in of_name]
        self.has_gradients = any(len(rule.values) > 1 for rule in rules)

    def numbers(self, output: Output) -> Numbers:
        own = self.matching(output.spot)
        inputs = tuple([(index, own if spot is output.spot else self.matching(spot)) for index, spot in output.inputs])
        key = (output.part, output.t if self.has_gradients else 0, own, inputs)
        if key not in self.known:
            problems: list[str] = []
            self.known[key] = self.looked_up(output, problems), tuple(problems)
        numbers, wrong = self.known[key]
        for text in wrong:
            self.wrong.setdefault(text, []).append(output.spot.name)
        return numbers

    def matching(self, spot: Spot) -> tuple[int, ...]:
        return tuple([number for number, pattern in enumerate(self.filters) if pattern.matches(spot)])

    def looked_up(self, output: Output, problems: list[str]) -> Numbers:
        part = self.recipe.slices[output.part]
        override = self.recipe.override_for(output.spot)
        method = METHODS[override.merge_method if override else self.recipe.merge_method]
        above: list[Parameters] = [override.parameters] if override else []
        below = [part.parameters, self.recipe.parameters]

        def value(key: str, parameter: Parameter, levels: list[Parameters], spot: Spot, whose: str) -> Value | None:
            rule = rule_for(key, levels, spot)
            if rule is None:
                if parameter.required:
                    problems.append(f"no filter gives {method.name} the parameter {key!r}{whose}")
                return parameter.default
            self.used.add(id(rule))
            given = along(rule.values, output.t)
            if isinstance(given, float) and float not in parameter.types and int in parameter.types:
                if given != int(given):
                    problems.append(f"{rule.at}: {key!r}{whose} is a whole number, and its gradient gives {given:g}")
                return int(given)
            return given

        shared: dict[str, Value | None] = {}
        per_model: list[dict[str, Value | None]] = [{} for _ in output.sources]
        for key, parameter in method.parameters.items():
            if not parameter.each:
                shared[key] = value(key, parameter, [*above, *below], output.spot, "")
        for own, (index, spot) in zip(per_model, output.inputs, strict=True):
            source = part.sources[index]
            levels = [*above, source.parameters, *below]
            for key, parameter in method.parameters.items():
                if parameter.each and (method.merges_base or index != part.base):
                    own[key] = value(key, parameter, levels, spot, f" of {source.model}")
        return Numbers(method.name, shared, tuple(per_model))

    def problems(self) -> Iterator[str]:
        for text, tensors in self.wrong.items():
            yield f"{text} for {first_of(tensors)}"


def _idle(recipe: Recipe, used: set[int], spots: Sequence[Spot]) -> Iterator[Remark]:
    """Yield a note for each filter that does nothing: often a name misspelt."""
    for parameters in recipe.levels:
        for name, rules in parameters.items():
            for rule in rules:
                if not rule.filter.matches_all and id(rule) not in used:
                    yield Remark(rule.filter.at, f"the filter {rule.filter} of {name!r} decides for no tensor")
    others = [("include", pattern) for pattern in recipe.include]
    others += [("exclude", pattern) for pattern in recipe.exclude]
    others += [("an override", override.filter) for override in recipe.overrides]
    for name, pattern in others:
        if not any(pattern.matches(spot) for spot in spots):
            yield Remark(pattern.at, f"the filter {pattern} of {name} matches no tensor")


def _filters(recipe: Recipe) -> Iterator[Filter]:
    """Yield the filters that look at a tensor before its numbers are known."""
    yield from (override.filter for override in recipe.overrides)
    for parameters in recipe.levels:
        yield from (rule.filter for rules in parameters.values() for rule in rules if not rule.filter.matches_all)
