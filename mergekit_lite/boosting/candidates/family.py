"""All candidates of a search: models that are made of the same inputs and differ in some numbers.

The inputs are opened once. A plan for other numbers costs no reading; so what is judged and what is written in the end
are the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mergekit_lite.boosting.candidates.candidate import Numbers
from mergekit_lite.boosting.candidates.ranges import Range
from mergekit_lite.boosting.candidates.tunable import Pair, RecipeTuning, Tunable, layers_of
from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.extrapolation import plan_extrapolation
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import parse, text_of

UNWRITTEN = Path("boosted")  # where a candidate would lie, were it written


class Family(Protocol):
    """What makes a plan of numbers.

    Attributes:
        ranges: the numbers by their names, with their bounds.
        baseline: the numbers that the others are compared with.
        opened: the inputs by their references.
    """

    ranges: Mapping[str, Range]
    baseline: Numbers
    opened: Mapping[str, Checkpoint]

    def plan(self, numbers: Numbers, output: Path = UNWRITTEN) -> Plan:
        """The plan of a candidate.

        Raises:
            MergekitLiteError: the models don't fit together, or a method refuses the numbers.
        """


class PairFamily:
    """An aligned model, the model it was tuned from, and alphas. The baseline is the aligned model itself."""

    def __init__(self, sft: str, aligned: str, tunables: Sequence[Tunable], options: Mapping[str, Any]) -> None:
        """``options`` are those of ``plan_extrapolation``: which tensors, dtype, rounding and seed."""
        self.sft = sft
        self.aligned = aligned
        self.numbers = Pair(tunables)
        self.given = dict(options)
        self.opened: Mapping[str, Checkpoint] = {reference: open_checkpoint(reference) for reference in (sft, aligned)}
        self.ranges: Mapping[str, Range] = {name: each.range for each in tunables for name in each.names}
        self.baseline: Numbers = dict.fromkeys(self.ranges, 0.0)

    @property
    def weak(self) -> Numbers:
        """The model before alignment."""
        return dict.fromkeys(self.ranges, -1.0)

    def plan(self, numbers: Numbers, output: Path = UNWRITTEN) -> Plan:
        """The plan that ``extrapolate`` makes for these alphas."""
        return plan_extrapolation(
            self.sft, self.aligned, output, opened=self.opened, **self.given, **self.numbers.options(numbers)
        )


class RecipeFamily:
    """A merge recipe, some numbers of which are tuned. The baseline is the recipe as it was written."""

    def __init__(self, path: Path, tunables: Sequence[Tunable], shard_size: int | None = None) -> None:
        """Read the recipe and open its models.

        Raises:
            UsageError: it can't be read, or a path leads nowhere.
        """
        content = text_of(path)
        recipe = parse(content, str(path))
        self.path = path
        self.shard_size = shard_size
        self.opened: Mapping[str, Checkpoint] = {model: open_checkpoint(model) for model in recipe.models}
        self.tuning = RecipeTuning(content, str(path), tunables, layers_of(self.opened[recipe.config_source].config))
        self.ranges: Mapping[str, Range] = {name: each.range for each in tunables for name in each.names}
        self.baseline: Numbers = self.tuning.as_written

    def plan(self, numbers: Numbers, output: Path = UNWRITTEN) -> Plan:
        """The plan that ``merge`` makes for the recipe with these numbers."""
        text = self.tuning.text(numbers)
        recipe = parse(text, f"{self.path} with {_told(numbers)}")
        return make_plan(recipe, [output], shard_size=self.shard_size, text=text, opened=self.opened)


def _told(numbers: Numbers) -> str:
    return ", ".join(f"{name}={number:g}" for name, number in numbers.items())
