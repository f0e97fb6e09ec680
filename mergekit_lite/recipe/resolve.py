"""The method and the numbers of every tensor.

A parameter's value comes from the first of these levels in which a rule matches the tensor: the override, the model
(for parameters that each model has), the slice, the recipe, the method's default. What models have each for themselves
is looked up by the name and layer of *that model's* tensor, all else by those of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from mergekit_lite.errors import counted
from mergekit_lite.methods import METHODS
from mergekit_lite.methods.parameters import Parameter
from mergekit_lite.recipe.layers import Output
from mergekit_lite.recipe.recipe import Recipe
from mergekit_lite.recipe.rules import Filter, Parameters, Spot, along, rule_for
from mergekit_lite.yaml_document import Remark, Value


class _Asked(NamedTuple):
    """A parameter of a method for a tensor; of one model, where each has its own."""

    method: str
    key: str
    parameter: Parameter
    spot: Spot
    model: str | None = None


class Numbers(NamedTuple):
    """What one tensor is made with.

    Attributes:
        merge_method: by which method.
        shared: the values that hold for all models.
        per_model: the values of each input, in the order of the output's inputs; none of a base that is no model to
            merge.
    """

    merge_method: str
    shared: Mapping[str, Value | None]
    per_model: tuple[Mapping[str, Value | None], ...]


class Resolved(NamedTuple):
    """Numbers for each output (None: it is copied), what is wrong, and what the user should know."""

    numbers: tuple[Numbers | None, ...]
    problems: tuple[str, ...]
    notes: tuple[Remark, ...]


def resolve(recipe: Recipe, outputs: Sequence[Output]) -> Resolved:
    """The numbers of all tensors.

    Args:
        recipe: the recipe.
        outputs: its tensors, from ``layers.outputs``.
    """
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
    matches: dict[Spot, tuple[bool, ...]] = field(default_factory=dict)

    def numbers(self, output: Output) -> Numbers:
        inputs = tuple([(index, self.matching(spot)) for index, spot in output.inputs])
        key = (output.part, output.t, self.matching(output.spot), inputs)
        if key not in self.known:
            problems: list[str] = []
            self.known[key] = self.looked_up(output, problems), tuple(problems)
        numbers, wrong = self.known[key]
        for text in wrong:
            self.wrong.setdefault(text, []).append(output.spot.name)
        return numbers

    def matching(self, spot: Spot) -> tuple[bool, ...]:
        """Which of the recipe's filters match."""
        if spot not in self.matches:
            self.matches[spot] = tuple([pattern.matches(spot) for pattern in self.filters])
        return self.matches[spot]

    def looked_up(self, output: Output, problems: list[str]) -> Numbers:
        part = self.recipe.slices[output.part]
        override = self.recipe.override_for(output.spot)
        name = override.merge_method if override else self.recipe.merge_method
        method = METHODS[name]
        above: list[Parameters] = [override.parameters] if override else []
        below = [part.parameters, self.recipe.parameters]
        shared = {
            key: self.value(_Asked(name, key, parameter, output.spot), [*above, *below], output.t, problems)
            for key, parameter in method.parameters.items()
            if not parameter.each
        }
        per_model = []
        for index, spot in output.inputs:
            source = part.sources[index]
            merged = method.merges_base or index != part.base
            levels = [*above, source.parameters, *below]
            per_model.append(
                {
                    key: self.value(_Asked(name, key, parameter, spot, source.model), levels, output.t, problems)
                    for key, parameter in method.parameters.items()
                    if parameter.each and merged
                }
            )
        return Numbers(name, shared, tuple(per_model))

    def value(self, asked: _Asked, levels: Sequence[Parameters], t: Fraction, problems: list[str]) -> Value | None:
        method, key, parameter, spot, model = asked
        rule = rule_for(key, levels, spot)
        whose = f" of {model}" if model else ""
        if rule is None:
            if parameter.required:
                problems.append(f"no filter gives {method} the parameter {key!r}{whose}")
            return parameter.default
        self.used.add(id(rule))
        value = along(rule.values, t)
        if isinstance(value, float) and float not in parameter.types and int in parameter.types:
            if value != int(value):
                problems.append(f"{rule.at}: {key!r}{whose} is a whole number, and its gradient gives {value:g}")
            return int(value)
        return value

    def problems(self) -> Iterator[str]:
        for text, tensors in self.wrong.items():
            more = f" and {counted(len(tensors) - 1, 'more tensor')}" if len(tensors) > 1 else ""
            yield f"{text} for {tensors[0]}{more}"


def _idle(recipe: Recipe, used: set[int], spots: Sequence[Spot]) -> Iterator[Remark]:
    """Filters that do nothing: often a name misspelt."""
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
    """All that look at a tensor before its numbers are known."""
    yield from (override.filter for override in recipe.overrides)
    for parameters in recipe.levels:
        yield from (rule.filter for rules in parameters.values() for rule in rules if not rule.filter.matches_all)
