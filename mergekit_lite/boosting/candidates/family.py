"""All candidates of a search: models made of the same inputs, which differ in some numbers.

The inputs are opened once; a plan for other params reads nothing again. A candidate is judged and written by one plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mergekit_lite.boosting.candidates.candidate import Params
from mergekit_lite.boosting.candidates.ranges import Range
from mergekit_lite.boosting.candidates.tunable import (
    TO_STEP,
    RecipeTuning,
    Tunable,
    alphas_of,
    check_pair_tunables,
    check_run_tunables,
)
from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.checkpoint.optional_tensors import layers_promised
from mergekit_lite.errors import MergekitLiteError, PlanError
from mergekit_lite.extrapolation import plan_checkpoint, plan_extrapolation, plan_run_extrapolation
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import lasting_text, parse, text_of

UNWRITTEN = Path("boosted")  # the output in the plans of candidates that aren't written


class Family(Protocol):
    """Makes plans of params."""

    ranges: Mapping[str, Range]  # the bounds of each parameter, by name
    baseline: Params  # the params that the others are compared with
    opened: Mapping[str, Checkpoint]  # the inputs by their references
    notes: Sequence[str]  # on the baseline, for the user

    def plan(self, params: Params, output: Path = UNWRITTEN) -> Plan:
        """Plan a candidate.

        Raises:
            MergekitLiteError: the models don't fit together, or a method refuses the params.
        """


class PairFamily:
    """An aligned model, the model it was tuned from, and alphas. The baseline is the aligned model itself."""

    notes: Sequence[str] = ()

    def __init__(self, sft: str, aligned: str, tunables: Sequence[Tunable], options: Mapping[str, Any]) -> None:
        """``options`` are those of ``plan_extrapolation``: which tensors, dtype, rounding and seed."""
        self.sft = sft
        self.aligned = aligned
        check_pair_tunables(tunables)
        self.tunables = tuple(tunables)
        self.given = dict(options)
        self.opened: Mapping[str, Checkpoint] = {reference: open_checkpoint(reference) for reference in (sft, aligned)}
        self.ranges: Mapping[str, Range] = {name: each.range for each in tunables for name in each.names}
        self.baseline: Params = dict.fromkeys(self.ranges, 0.0)

    @property
    def weak(self) -> Params:
        """The params of the model before alignment."""
        return dict.fromkeys(self.ranges, -1.0)

    def plan(self, params: Params, output: Path = UNWRITTEN) -> Plan:
        """Plan as ``extrapolate`` does for these alphas."""
        alphas = alphas_of(self.tunables, params)
        return plan_extrapolation(self.sft, self.aligned, output, opened=self.opened, **self.given, **alphas)


class RunFamily:
    """A training run, followed to later steps. The baseline is its last checkpoint as it is, at the step it has.

    So a candidate at that very step, the line without the run's noise, is none of the family.
    """

    notes: Sequence[str] = ()

    def __init__(
        self,
        base: str,
        checkpoints: Sequence[str],
        steps: Sequence[float],
        tunables: Sequence[Tunable],
        options: Mapping[str, Any],
    ) -> None:
        """Open the checkpoints, whose steps are given; ``options`` are those of ``plan_run_extrapolation``.

        Raises:
            UsageError: something else than ``to_step`` is tuned.
        """
        check_run_tunables(tunables)
        self.base = base
        self.checkpoints, self.steps = list(checkpoints), list(steps)
        self.given = dict(options)
        self.opened: Mapping[str, Checkpoint] = {
            reference: open_checkpoint(reference) for reference in (base, *self.checkpoints)
        }
        self.ranges: Mapping[str, Range] = {each.text: each.range for each in tunables}
        self.last = max(self.steps)
        self.baseline: Params = {TO_STEP: self.last}

    def plan(self, params: Params, output: Path = UNWRITTEN) -> Plan:
        """Plan as ``extrapolate`` does for this step; at the last checkpoint's that one itself, to the bit."""
        if params == self.baseline:
            last = self.checkpoints[self.steps.index(self.last)]
            return plan_checkpoint(self.base, last, output, opened=self.opened, **self.given)
        return plan_run_extrapolation(
            self.base,
            self.checkpoints,
            output,
            params[TO_STEP],
            steps=self.steps,
            opened=self.opened,
            **self.given,
        )


class RecipeFamily:
    """A merge recipe, some numbers of which are tuned. The baseline is the recipe as it was written."""

    def __init__(self, path: Path, tunables: Sequence[Tunable]) -> None:
        """Read the recipe and open its models.

        Raises:
            UsageError: it can't be read, or has no parameter at a path.
        """
        content = text_of(path)
        recipe = parse(content, str(path))
        content = lasting_text(recipe, content)
        self.path = path
        self.opened: Mapping[str, Checkpoint] = {model: open_checkpoint(model) for model in recipe.models}
        self.tuning = RecipeTuning(
            content, str(path), tunables, layers_promised(self.opened[recipe.config_source].config)
        )
        self.ranges: Mapping[str, Range] = {name: each.range for each in tunables for name in each.names}
        self.baseline: Params = self.tuning.as_written
        self.notes: Sequence[str] = self.tuning.notes

    def plan(self, params: Params, output: Path = UNWRITTEN) -> Plan:
        """Plan as ``merge`` does for the recipe with these params."""
        text = self.tuning.text(params)
        numbers = ", ".join(f"{name}={number:g}" for name, number in params.items())
        return make_plan(parse(text, f"{self.path} with {numbers}"), [output], text=text, opened=self.opened)


def can_bracket(family: Family) -> bool:
    """Return whether one number is tuned, of a pair or a run, so that a bracket can be searched."""
    return isinstance(family, PairFamily | RunFamily) and len(family.ranges) == 1


def check_plans(family: Family) -> list[str]:
    """Plan the baseline and both ends of all ranges, so that no candidate between is refused half-way; return notes.

    Raises PlanError with all that is refused.
    """
    ends = ({name: getattr(of, end) for name, of in family.ranges.items()} for end in ("low", "high"))
    notes: dict[str, None] = dict.fromkeys(family.notes)
    problems: dict[str, None] = {}
    for params in (family.baseline, *ends):
        try:
            plan = family.plan(params)
            notes |= dict.fromkeys(plan.notes)
            if any(job.scales for job in plan.jobs):
                problems["candidates are not measured in fp8: make the chosen one again with extrapolate or merge"] = (
                    None
                )
        except PlanError as error:
            problems |= dict.fromkeys(error.problems)
        except MergekitLiteError as error:
            problems[str(error)] = None
    if problems:
        raise PlanError(list(problems))
    return list(notes)
