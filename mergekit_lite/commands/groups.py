"""A plan's jobs in groups that fit on a screen: tensors that are merged alike, along the layers or in all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergekit_lite.commands.json_output import shown
from mergekit_lite.errors import counted
from mergekit_lite.planning import Job, Plan
from mergekit_lite.planning.statistics import is_averaged
from mergekit_lite.recipe.layers import place

MOST_TURNS = 7  # values of a gradient that are shown


class Group(NamedTuple):
    """Jobs that are done alike: what is done in words, how many tensors and bytes, their dtypes, and one of them."""

    what: str
    tensors: int
    nbytes: int
    dtype: str
    example: str


@dataclass
class _Run:
    """Jobs that have the same numbers in each layer that they share, and are otherwise alike."""

    by_layer: dict[int | None, Job]
    jobs: list[Job]

    def takes(self, other: _Run) -> bool:
        """Whether the other's jobs have the same numbers in every layer that both have."""
        common = self.by_layer.keys() & other.by_layer.keys()
        return bool(common) and all(_numbers(self.by_layer[at]) == _numbers(other.by_layer[at]) for at in common)


def groups(plan: Plan) -> list[Group]:
    """Return the jobs of a plan in groups, in the order in which each group's first job is written."""
    families: dict[Hashable, _Run] = {}
    for job in plan.jobs:
        at = place(job.name)
        family = (_alike(job), (at.stack, at.rest) if at else job.name)
        run = families.setdefault(family, _Run({}, []))
        run.by_layer[at.layer if at else None] = job
        run.jobs.append(job)
    alike: dict[Hashable, list[_Run]] = {}
    for run in families.values():
        numbers = {_numbers(job) for job in run.by_layer.values()}
        if len(numbers) == 1:  # the same in all layers, as are tensors outside of them
            run.by_layer = {None: run.jobs[0]}
        others = alike.setdefault(_alike(run.jobs[0]), [])
        into = next((other for other in others if other.takes(run)), None)
        if into is None:
            others.append(run)
        else:
            into.by_layer |= run.by_layer
            into.jobs += run.jobs
    return [_group(run) for runs in alike.values() for run in runs]


def _alike(job: Job) -> Hashable:
    stored = frozenset([spec.stored_dtype for spec in job.inputs])
    return job.method, job.why, 0 < job.merged_elements < job.numel, job.dtype, stored, is_averaged(job)


def _numbers(job: Job) -> Hashable:
    return tuple([tuple(parameters.items()) for parameters in job.parameters])


def _group(run: _Run) -> Group:
    first = run.jobs[0]
    stored = ", ".join(sorted({spec.stored_dtype for spec in first.inputs}))
    dtype = first.dtype if stored in ("", first.dtype) else f"{stored} → {first.dtype}"
    return Group(_what(run), len(run.jobs), sum(job.nbytes for job in run.jobs), dtype, first.name)


def _what(run: _Run) -> str:
    """Return in words what is done: ``ties weight 0.2 … 0.8, density 0.5 along 32 layers``, ``copy (excluded)``."""
    first = run.jobs[0]
    if first.scales_of:
        return "scales of FP8 blocks"
    if not first.merged_elements:
        return f"copy ({first.why})" if first.why else "copy"
    jobs = [run.by_layer[at] for at in sorted(run.by_layer, key=lambda at: -1 if at is None else at)]
    of_outputs = []
    for number, parameters in enumerate(first.parameters):
        along = {name: [job.parameters[number].get(name) for job in jobs] for name in parameters}
        of_outputs.append(", ".join(f"{name} {_values(values)}" for name, values in along.items()))
    layers = f" along {counted(len(jobs), 'layer')}" if len(jobs) > 1 else ""
    rows = ", no statistics: averaged" if is_averaged(first) else ""
    rows += ", new rows copied" if first.merged_elements < first.numel else ""
    return f"{first.method} {' | '.join(of_outputs)}".rstrip() + layers + rows


def _values(values: Sequence[Any]) -> str:
    """Return one parameter's values along the layers as text; of each model, where each has its own."""
    if isinstance(values[0], tuple):
        each = [_gradient(of_model) for of_model in zip(*values, strict=True)]
        return each[0] if len(set(each)) == 1 else " / ".join(each)
    return _gradient(values)


def _gradient(values: Iterable[Any]) -> str:
    """Return the values at which a gradient starts, turns and ends: ``0 … 1 … 0.5``."""
    turns: list[Any] = []
    for value in values:
        if turns and value == turns[-1]:
            continue
        if len(turns) > 1 and _goes_on(turns[-2], turns[-1], value):
            turns.pop()
        turns.append(value)
    if len(turns) > MOST_TURNS and not isinstance(turns[0], str | bool):
        return f"{shown(turns[0])} … {shown(turns[-1])} (from {shown(min(turns))} to {shown(max(turns))})"
    return " … ".join(map(shown, turns))


def _goes_on(before: Any, value: Any, after: Any) -> bool:
    numbers = not isinstance(before, str | bool) and not isinstance(after, str | bool)
    return numbers and (before < value < after or before > value > after)
