"""One mixture remade: its tensors under other names, fewer of them or averaged; what such plans have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.encodings.dense import Dense
from mergekit_lite.checkpoint.encodings.drawn import unstored
from mergekit_lite.checkpoint.encodings.sum import Term
from mergekit_lite.checkpoint.naming.alignment import unwrapped
from mergekit_lite.errors import CheckpointError, PlanError, UsageError
from mergekit_lite.layout import OutputPath, is_single_file, output_path
from mergekit_lite.planning import Job, Plan
from mergekit_lite.planning.front_matter import carried_over
from mergekit_lite.planning.matching import arranged, output_dtype
from mergekit_lite.planning.planner import SHARD_SIZE, opened_models

Recipe = Mapping[str, Any]


def opened_mixture(reference: str, opened: Mapping[str, Checkpoint] | None = None) -> Checkpoint:
    """Open a mixture, unless it is open already. Raises CheckpointError where that can't be, or it has no config."""
    (model,) = opened_models([reference], opened or {})
    if model.is_of_several:
        raise PlanError([model.of_several])
    if model.config is None:
        raise CheckpointError(f"{reference}: has no config.json, which says what its experts are. Name a folder.")
    return unwrapped(model)


def copied(name: str, spec: TensorSpec, why: str = "") -> Job:
    """Return the job that takes a tensor over under a name."""
    return Job(name, output_dtype(spec, None), spec.shape, (spec,), (0,), why=why)


def mean_of(name: str, specs: Sequence[TensorSpec], weights: Sequence[float]) -> TensorSpec:
    """Return the weighted mean Σ w·x / Σ w, which is summed in float64 while it is read; of one tensor that itself."""
    if len(specs) == 1:
        return specs[0]
    terms = [Dense(replace(spec, name=f"{name}\0{number}"), scale=weight / sum(weights))
             for number, (spec, weight) in enumerate(zip(specs, weights, strict=True))]  # fmt: skip
    return _summed(specs[0], name, *terms)


def alike(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return tensors of one dtype that holds what all of them hold, so that they can be read as one."""
    dtype = dtypes.promoted(spec.dtype for spec in specs)
    return [
        spec
        if spec.dtype == dtype
        else replace(
            unstored(spec, spec.name, dtype, spec.shape, Dense(spec)), written_as=spec.written_as or spec.dtype
        )
        for spec in specs
    ]


def _summed(like: TensorSpec, name: str, *terms: Term) -> TensorSpec:
    """Return the sum of terms as wide as arithmetic on such a tensor is, to be written as that tensor would be."""
    dtype = "float64" if like.dtype == "float64" else "float32"
    return replace(unstored(like, name, dtype, like.shape, *terms), written_as=like.written_as or like.dtype)


def plan_of(
    model: Checkpoint,
    jobs: list[Job],
    config: Mapping[str, Any],
    output: str | OutputPath,
    recipe: Recipe,
    *,
    left_out: Mapping[str, str],
    shard_size: int | None = None,
    copy_code: bool = False,
    notes: Sequence[str] = (),
    card: Sequence[str] = (),
) -> Plan:
    """Return the plan that makes one model of tensors of another.

    Args:
        model: that the tensors are of; its tokenizer and other small files travel with the output.
        jobs: the output's tensors.
        config: of the output.
        output: a folder.
        recipe: what was asked for, from which ``verify`` makes the plan again.
        left_out: why tensors of the model are in no output tensor, by name.
        shard_size: most bytes of data in one file; by default the model's shards, or 5 GB where names are others.
        copy_code: copy the model's own code, which its config names.
        notes: what the user should know.
        card: paragraphs for the output's card.

    Raises:
        UsageError: the output is a single file, which holds no config.
    """
    path = output_path(output)
    if is_single_file(path):
        raise UsageError(f"{path}: is a single file, and the config changes with the experts: name a folder.")
    is_new = not model.in_shards or any(job.name not in model.tensors for job in jobs)
    layout = arranged(jobs, model, path, shard_size or (SHARD_SIZE if is_new else None))
    front_matter, notes_on_card = carried_over(model)
    return Plan(
        recipes=(recipe,),
        inputs=(model,),
        config_source=0,
        jobs=tuple(jobs),
        left_out=tuple(_left_out(model, left_out)),
        layout=layout,
        outputs=(path,),
        config=config,
        front_matter=front_matter,
        shard_size=shard_size,
        copy_code=copy_code,
        notes=(*model.notes, *notes, *notes_on_card),
        card=tuple(card),
    )


def _left_out(model: Checkpoint, left_out: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name, why in {**left_out, **model.left_out}.items():
        yield model.reference, name, why
