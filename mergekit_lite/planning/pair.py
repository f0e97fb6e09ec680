"""Planning a recipe of one tuned model and the one it was tuned from (ExPO)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, open_checkpoint, tied_weights
from mergekit_lite.errors import PlanError
from mergekit_lite.planning.matching import MismatchError, arranged, copied, is_buffer, output_dtype, shared_elements
from mergekit_lite.planning.plan import Job, Plan
from mergekit_lite.recipe.recipe import Recipe


def plan(recipe: Recipe, outputs: Sequence[str | Path], *, opened: Mapping[str, Checkpoint] | None = None) -> Plan:
    """Resolve a recipe against its models' headers.

    Args:
        recipe: the recipe.
        outputs: a path for each of its variants: ``*.safetensors``, ``*.pt`` / ``*.pth`` / ``*.bin``, or a folder.
        opened: models that are open already, by reference.

    Raises:
        CheckpointError: a model can't be opened.
        PlanError: the models don't fit together; every problem is named.
    """
    inputs = tuple((opened or {}).get(model) or open_checkpoint(model) for model in recipe.models)
    jobs, left_out, problems = _jobs(recipe, inputs)
    problems += [
        f"the pattern {pattern!r} matches no tensor of {inputs[0].reference}"
        for pattern in recipe.patterns
        if not any(re.search(pattern, name) for name in inputs[0].tensors)
    ]
    if problems:
        raise PlanError(problems)
    paths = tuple(Path(output).expanduser() for output in outputs)
    layout = arranged(jobs, inputs[0], paths[0], recipe.shard_size)
    return Plan(
        recipes=tuple(recipe.as_data(variant) for variant in range(len(recipe.variants))),
        inputs=inputs,
        donor=0,
        jobs=tuple(jobs),
        left_out=tuple(left_out),
        layout=layout,
        outputs=paths,
        rounding=recipe.rounding,
        seed=recipe.seed,
        out_dtype=recipe.out_dtype,
        shard_size=recipe.shard_size,
        notes=tuple(_notes(jobs, left_out)),
    )


def _jobs(recipe: Recipe, inputs: tuple[Checkpoint, ...]) -> tuple[list[Job], list[tuple[str, str, str]], list[str]]:
    first, *others = inputs
    jobs: list[Job] = []
    problems: list[str] = []
    used: list[set[str]] = [set() for _ in others]
    for spec in first.tensors.values():
        counterparts = [tied_weights.counterpart(spec.name, other.tensors) for other in others]
        for names, counterpart in zip(used, counterparts, strict=True):
            if counterpart is not None:
                names.add(counterpart.name)
        try:
            jobs.append(_job(recipe, spec, counterparts, [other.reference for other in others]))
        except MismatchError as mismatch:
            problems.append(str(mismatch))
    left_out = [(checkpoint.reference, name, why) for checkpoint in inputs for name, why in checkpoint.left_out.items()]
    for other, names in zip(others, used, strict=True):
        for name in other.tensors:
            if name in names:
                continue
            why = _why_spare(name, first)
            if why is None:
                problems.append(f"{name}: is in {other.reference}, but not in {first.reference}")
            else:
                left_out.append((other.reference, name, why))
    return jobs, left_out, problems


def _job(recipe: Recipe, spec: TensorSpec, counterparts: Sequence[TensorSpec | None], references: Sequence[str]) -> Job:
    dtype = output_dtype(spec, recipe.out_dtype)
    if not recipe.selects(spec.name):
        return copied(spec, 0, dtype, "not selected")
    if not dtypes.is_float(spec.dtype):
        return copied(spec, 0, dtype, f"{spec.dtype} is not for arithmetic")
    present: list[TensorSpec] = []
    merged = spec.numel
    for reference, counterpart in zip(references, counterparts, strict=True):
        if counterpart is None:
            if is_buffer(spec.name):
                return copied(spec, 0, dtype, f"a buffer that {reference} lacks")
            raise MismatchError(f"{spec.name}: is missing in {reference}")
        if not dtypes.is_float(counterpart.dtype):
            raise MismatchError(f"{spec.name}: is {spec.dtype} here, {counterpart.dtype} in {reference}")
        merged = min(merged, shared_elements(spec, counterpart, reference, recipe.new_rows == "copy"))
        present.append(counterpart)
    parameters = tuple(
        {name: setting.value(spec.name) for name, setting in variant.items()} for variant in recipe.variants
    )
    return Job(
        spec.name,
        spec.shape,
        dtype,
        (spec, *present),
        tuple(range(1 + len(present))),
        has_base=True,
        method=recipe.merge_method,
        parameters=parameters,
        merged=merged,
    )


def _why_spare(name: str, first: Checkpoint) -> str | None:
    """Why a tensor that the first model lacks may be left out, or None where it may not."""
    if tied_weights.tied_to(name, first.tensors) is not None:
        return f"{first.reference} ties its head to its embedding"
    return "a buffer, computed on loading" if is_buffer(name) else None


def _notes(jobs: Sequence[Job], left_out: Sequence[tuple[str, str, str]]) -> list[str]:
    notes = []
    if not any(job.merged for job in jobs):
        notes.append("No tensor goes through the method: the output is a copy of the first model.")
    heads = [f"{name} of {reference}" for reference, name, _ in left_out if tied_weights.is_head(name)]
    if heads:
        notes.append(f"{', '.join(heads)} is left out: the first model ties its head to its embedding.")
    return notes
