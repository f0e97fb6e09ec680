"""Statistics beside models: files that hold what a method needs to know of them, found for each job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import xxhash

from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.naming.alignment import unwrapped
from mergekit_lite.checkpoint.statistics_file import CALLED, Statistics, open_statistics
from mergekit_lite.errors import CheckpointError
from mergekit_lite.methods import METHODS, Method
from mergekit_lite.planning.plan import Job
from mergekit_lite.recipe import Recipe, as_data


class WithStatistics(NamedTuple):
    """Jobs with the statistics that their methods read, the files of these, and what is wrong."""

    jobs: list[Job]
    files: tuple[Checkpoint, ...]
    problems: list[str]


@dataclass(frozen=True)
class _Beside:
    """The statistics of one input of a plan."""

    statistics: Statistics
    number: int  # of their file among the plan's inputs
    names: Mapping[tuple[Path, int], str]  # the names that tensors have where the model is read by itself

    def weight(self, spec: TensorSpec) -> str:
        """Return the name that the statistics know a tensor by."""
        return self.names.get((spec.file, spec.offset), spec.name)

    def fisher(self, spec: TensorSpec) -> TensorSpec | None:
        """Return the Fisher information of a tensor, if it is there."""
        found = self.statistics.file.tensors.get(self.weight(spec))
        return found if found is not None and found.shape == spec.shape else None

    def gram(self, spec: TensorSpec) -> tuple[TensorSpec, int] | None:
        """Return the Gram matrix of what a tensor meets and the axis that meets it, if it is there."""
        weight = self.weight(spec)
        if (found := self.statistics.gram(weight)) is None or len(spec.shape) != 2:
            return None
        axis = self.statistics.grams[weight].axis
        return (found, axis) if found.shape[0] == spec.shape[axis] else None


def with_statistics(
    recipe: Recipe,
    jobs: list[Job],
    opened: Sequence[Checkpoint],
    inputs: Sequence[Checkpoint],
    already: Mapping[str, Checkpoint],
    *,
    rows_move: bool,
) -> WithStatistics:
    """Return a plan's jobs with the statistics of their models.

    Args:
        recipe: which names them.
        jobs: of the recipe.
        opened: its models as they were opened.
        inputs: the same ones under the names of the output.
        already: files that are open already, by reference.
        rows_move: whether rows of embeddings and heads follow their tokens to other places.
    """
    if not any(kind_read(job) for job in jobs):
        return WithStatistics(jobs, (), [])
    problems: list[str] = []
    models = list(zip(recipe.models, opened, inputs, strict=True))
    readers = {job.method: METHODS[job.method] for job in jobs if kind_read(job)}
    beside = _opened(recipe, models, already, list(readers.values()), problems)
    if rows_move and any(kind_read(job) == "fisher" for job in jobs):
        problems.append("fisher: statistics don't follow rows of the vocabulary to other places: no tokenizer_source")
    if problems:
        return WithStatistics(jobs, (), problems)
    made = [_with(job, beside) if kind_read(job) else job for job in jobs]
    if all(map(is_averaged, filter(kind_read, made))):
        problems.append(
            "no tensor has statistics in every model, so all would only be averaged: see merge_method: linear"
        )
    files = {each.number: each.statistics.file for each in beside.values()}
    return WithStatistics(made, tuple(files[number] for number in sorted(files)), problems)


def kind_read(job: Job) -> str:
    """Return the kind of statistics that a job's method reads; empty for none."""
    return METHODS[job.method].statistics if job.merged_elements else ""


def is_averaged(job: Job) -> bool:
    """Return whether a job's method reads statistics, and there are none of its tensor in all models."""
    return bool(kind_read(job)) and not (job.fisher or job.grams)


def _opened(
    recipe: Recipe,
    models: Sequence[tuple[str, Checkpoint, Checkpoint]],
    already: Mapping[str, Checkpoint],
    readers: Sequence[Method],
    problems: list[str],
) -> dict[int, _Beside]:
    """Return the statistics of each input for the methods that read them, held to the model that they are of."""
    kinds: set[str] = {method.statistics for method in readers}
    named: dict[str, str | None] = {}
    for source in (source for part in recipe.slices for source in part.sources):
        known = named.setdefault(source.model, source.statistics)
        if known != source.statistics:
            problems.append(f"{source.model}: has statistics {known} in one slice and {source.statistics} in another")
    beside: dict[int, _Beside] = {}
    for number, (model, was, now) in enumerate(models):
        if (reference := named.get(model)) is None:
            problems.append(f"{model}: {' and '.join(sorted(kinds))} statistics are missing: name its 'statistics'")
            continue
        try:
            place = already[reference].path if reference in already else None
            statistics = open_statistics(reference, place, written_by=readers[0].gathered_by)
            problems += _misfit(statistics, was, kinds)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        own = unwrapped(was)  # as it is read by itself
        names = {} if own is now else {(spec.file, spec.offset): name for name, spec in own.tensors.items()}
        beside[number] = _Beside(statistics, len(models) + len(beside), names)
    files = [each.statistics for each in beside.values()]
    problems += _wrong_prefix(recipe, {model: was for model, was, _ in models}, files, readers)
    return beside


def digest_of_merge(recipe: Recipe, models: Mapping[str, Checkpoint]) -> str:
    """Return a digest of what a recipe merges and how: of the models' weights, whatever they are called, in any order.

    Where statistics are and which dtype is written has no part in it.
    """
    asked = as_data(recipe)
    weights = {reference: model.identity().sample for reference, model in models.items()}
    listed = [[weights[each["model"]], each.get("parameters")] for each in asked.get("models", ())]
    how = [asked.get(key) for key in ("merge_method", "parameters", "overrides", "include", "exclude", "backbone")]
    others = [asked.get(key) for key in ("slices", "modules", "tokenizer", "tokenizer_source")]
    others.append(len(recipe.outputs))  # each has other numbers
    copied = weights[recipe.config_source] if recipe.include or recipe.exclude or recipe.base_model else None
    content = [sorted(json.dumps(each, sort_keys=True) for each in listed), how, others, copied]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _wrong_prefix(
    recipe: Recipe, models: Mapping[str, Checkpoint], statistics: Sequence[Statistics], readers: Sequence[Method]
) -> list[str]:
    """Return what is wrong with where text came from that files are of: through merged layers of the recipe, or not."""
    plus = [method for method in readers if method.prefixed]
    if plus and len(plus) < len(readers):
        names = " and ".join(method.name for method in readers)
        return [f"{names} read statistics that are gathered in other ways, and a model has one file: take one of them"]
    called = readers[0].name
    anew = f"gather them: {readers[0].gathered_by}"
    behind = [each for each in statistics if each.prefix is not None]
    if not plus:
        wrong = f"was gathered behind merged layers, for regmean_plus; {called} reads what one model makes by itself"
        return [f"{each.file.reference}: {wrong}: {anew}" for each in behind]
    if alone := [each.file.reference for each in statistics if each.prefix is None]:
        wrong = f"was gathered of one model by itself, for regmean; {called} needs it behind the merged layers"
        return [f"{reference}: {wrong}: {anew}" for reference in alone]
    if len({each.prefix for each in behind}) > 1:
        files = " and ".join(each.file.reference for each in behind)
        return [f"{files}: were not gathered in one go, so that each is of other merged layers: {anew}"]
    if behind and behind[0].prefix is not None and behind[0].prefix.recipe != digest_of_merge(recipe, models):
        other = "was gathered behind merged layers of another recipe: of other models or numbers"
        return [f"{behind[0].file.reference}: {other}: {anew}"]
    return []


def _misfit(statistics: Statistics, model: Checkpoint, kinds: set[str]) -> list[str]:
    """Return what is wrong with a file of statistics for a model."""
    own = statistics.file.reference
    if kinds != {statistics.kind}:
        wanted = " and ".join(CALLED[kind] for kind in CALLED if kind in kinds)
        flag = " with --fisher" if kinds == {"fisher"} else " without --fisher" if kinds == {"gram"} else ""
        return [f"{own}: holds {CALLED[statistics.kind]}, and the recipe needs {wanted}: collect them{flag}"]
    identity = model.identity()
    if statistics.model.is_of(identity):
        return []
    differ = "weights" if statistics.model.header == identity.header else "tensors"
    return [
        f"{own}: is of {statistics.model.reference}, whose {differ} are not those of {model.reference}: collect the "
        "statistics of this very model"
    ]


def _with(job: Job, beside: Mapping[int, _Beside]) -> Job:
    """Return a job with the statistics of its models, where all of them have some of its tensor."""
    own = [beside[model] for model in job.models]
    pairs = list(zip(own, job.inputs, strict=True))
    if kind_read(job) == "fisher":
        found = [fisher for each, spec in pairs if (fisher := each.fisher(spec)) is not None]
        if len(found) < len(pairs) or job.merged_elements < job.numel:
            return job
        models = (*job.models, *(each.number for each in own))
        return replace(job, inputs=(*job.inputs, *found), models=models, fisher=True)
    grams = [gram for each, spec in pairs if (gram := each.gram(spec)) is not None]
    alike = len({axis for _, axis in grams}) == 1 and len({spec.shape for spec in job.inputs}) == 1
    if len(grams) < len(pairs) or not alike:
        return job
    return replace(job, grams=tuple(spec for spec, _ in grams), gram_axis=grams[0][1])
