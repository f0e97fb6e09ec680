"""Rules: the tensors a value is for, and how it runs along the layers.

A parameter is written in one of three ways:

    weight: 0.5                      one value
    weight: [0, 0.5, 1]              a gradient along the layers of the slice
    weight:                          the first entry that matches a tensor decides
      - filter: self_attn            part of the tensor's name
        value: [0, 0.5, 1]
      - filter: "regex:(up|gate)_proj"
        layers: [0, 8]               only in layers 0 to 7
        value: 0.3
      - value: 0.1                   all others

``filter: "*"`` and no filter at all match every tensor. ``layers: [first, end)`` matches by the number of the layer and
never matches a tensor outside the layers. Where an entry has both, both must match. ``regex:`` and ``layers:`` are
additions to mergekit's language.

A gradient has t = j/(n − 1) in layer j of n, t = 1 where n = 1, and t = 0 outside the layers (before and behind them,
as in mergekit, so that lm_head and the last norm take the *first* value). Numbers are interpolated; truth values and
texts step, to the value with index ⌊t·(m − 1)⌋ of m. t is an exact fraction: in floating point the 48 steps of 48
layers would not all fall on their own layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from mergekit_lite.yaml_document import Mark, Value

REGEX = "regex:"
NOWHERE = Mark(1, 1)


class Spot(NamedTuple):
    """A tensor as a filter sees it: its name, and its layer if it has one."""

    name: str
    layer: int | None = None


@dataclass(frozen=True)
class Filter:
    """A choice of tensors by a part of their names, a regular expression, or their layers."""

    text: str = "*"
    layers: tuple[int, int] | None = None
    at: Mark = field(default=NOWHERE, compare=False)

    @property
    def expression(self) -> str:
        """The text of the regular expression that finds what the filter matches."""
        if self.text == "*":
            return ""
        return self.text[len(REGEX) :] if self.text.startswith(REGEX) else re.escape(self.text)

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """The regular expression that the filter is; None where it is plain text. Raises re.error."""
        return re.compile(self.expression) if self.text.startswith(REGEX) else None

    @property
    def matches_all(self) -> bool:
        """Whether the filter matches every tensor."""
        return self.text == "*" and self.layers is None

    def matches(self, spot: Spot) -> bool:
        """Return whether a tensor matches."""
        if self.layers is not None and (spot.layer is None or not self.layers[0] <= spot.layer < self.layers[1]):
            return False
        if self.pattern is not None:
            return self.pattern.search(spot.name) is not None
        return self.text == "*" or self.text in spot.name

    def __str__(self) -> str:
        layers = f"layers [{self.layers[0]}, {self.layers[1]})" if self.layers else ""
        return f"{self.text!r} in {layers}" if layers and self.text != "*" else layers or repr(self.text)


@dataclass(frozen=True)
class Rule:
    """A value for the tensors of a filter: one for all of them, or several that run along the layers."""

    values: tuple[Value, ...]
    filter: Filter = Filter()
    at: Mark = field(default=NOWHERE, compare=False)


Rules = tuple[Rule, ...]
Parameters = Mapping[str, Rules]


def along(values: Sequence[Value], t: Fraction) -> Value:
    """Return the value of a gradient at t, 0 ≤ t ≤ 1.

    >>> along([0, 10, 30], Fraction(1, 4)), along([0, 10, 30], Fraction(3, 4))
    (5.0, 20.0)
    """
    if len(values) == 1:
        return values[0]
    index, rest = divmod(t.numerator * (len(values) - 1), t.denominator)
    low, high = values[index], values[min(index + 1, len(values) - 1)]
    if rest == 0 or isinstance(low, bool | str) or isinstance(high, bool | str):
        return low
    # In this form equal neighbours give themselves, to the bit.
    return low + (high - low) * (rest / t.denominator)


def joined(above: Parameters, below: Parameters) -> Parameters:
    """Return two levels of parameters as one: the rules of the level above go first."""
    levels: dict[str, Rules] = {}
    for name in dict.fromkeys([*above, *below]):
        rules = (*above.get(name, ()), *below.get(name, ()))
        reached = next((number for number, rule in enumerate(rules) if rule.filter.matches_all), len(rules))
        levels[name] = rules[: reached + 1]  # those behind one that matches everything are never reached
    return levels


def first(rules: Iterable[Rule], spot: Spot) -> Rule | None:
    """Return the rule that decides for a tensor."""
    return next((rule for rule in rules if rule.filter.matches(spot)), None)


def rule_for(name: str, levels: Iterable[Parameters], spot: Spot) -> Rule | None:
    """Return the rule that decides a parameter for a tensor: of the first level in which one matches."""
    rules = (first(level[name], spot) for level in levels if name in level)
    return next((rule for rule in rules if rule is not None), None)
