"""Combine task vectors by any method of the recipes: each stands for a model over a base of zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.change import Change
from mergekit_lite.checkpoint.references import Addend, addend
from mergekit_lite.checkpoint.vector_file import Delta, Vector, described, from_zero, read_vector
from mergekit_lite.engine.run import Finished, RunOptions, run
from mergekit_lite.errors import CheckpointError, PlanError, UsageError
from mergekit_lite.layout import OutputTensor, safetensors_layout
from mergekit_lite.methods import METHODS
from mergekit_lite.options import named_options
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import parse, to_yaml

if TYPE_CHECKING:
    from typing_extensions import Unpack

ZERO = "zero"


@named_options
def plan_combine(
    vectors: Sequence[str],
    output: str | Path,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    rebase: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> Plan:
    """Plan a combination of task vectors; see ``combine_vectors`` for the arguments and errors."""
    path = Path(output).expanduser()
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: a task vector is a .safetensors file. Name one: -o {path.name}.safetensors.")
    if not vectors:
        raise UsageError("No task vector was given: mergekit-lite vector combine --method ties a b -o v.safetensors.")
    named = [addend(str(text)) for text in vectors]
    opened = [read_vector(one.path, Path(one.path).expanduser().resolve()) for one in _files(named)]
    if not rebase:
        _check_one_base(opened)
    known = METHODS.get(method)
    base = None if known is not None and known.merges_base else ZERO
    each = known.parameters["weight"].each if known is not None and "weight" in known.parameters else ""
    weighted = bool(each) and "weight" not in (parameters or {})
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [_model(one, weighted) for one in named],
        "parameters": dict(parameters or {}),
        "out_dtype": dtypes.float_named(dtype),
        "seed": seed,
    }
    if base is not None:
        recipe["base_model"] = base
    text = to_yaml(recipe)
    loaded = parse(text, "vector combine")
    sources = {one.path: checkpoint for one, checkpoint in zip(named, _over_zero(opened), strict=True)}
    sources[ZERO] = _zeros(list(sources.values()))
    plan = make_plan(loaded, [path], text=text, opened=sources)
    tensors = [OutputTensor(job.name, job.dtype, job.shape) for job in plan.jobs]
    written = _written(opened)
    about = {job.name: (written[job.name], job.shape) for job in plan.jobs}
    metadata = described("dense", opened[0].base, about)
    recipe_told = {**plan.recipes[0], "combines": [str(one) for one in named]}
    return replace(plan, recipes=(recipe_told,), layout=safetensors_layout([tensors], path.name, metadata))


@named_options
def combine_vectors(
    vectors: Sequence[str],
    output: str | Path,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    rebase: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Combine task vectors of one base into one, that may be applied like any other.

    Args:
        vectors: files, each ``PATH`` or ``PATH:WEIGHT`` where the method gives every model a weight.
        output: a ``.safetensors`` file.
        method: any method of the recipes; the base of those that need one is zero.
        parameters: the method's, for all vectors.
        rebase: take vectors of different bases for vectors of the first one's.
        dtype: of the result.
        seed: of methods that draw.
        **run_options: see ``RunOptions``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError: an option, the method or a parameter is wrong, or the output exists.
        CheckpointError: a vector can't be opened, holds tensors in full, or is of another base.
        PlanError: the vectors don't fit together; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    planned = plan_combine(vectors, output, method, parameters, rebase=rebase, dtype=dtype, seed=seed)
    return run(planned, **run_options)


def _files(named: Sequence[Addend]) -> Sequence[Addend]:
    wrong = [f"{one.path}: is not a file" for one in named if not Path(one.path).expanduser().is_file()]
    if wrong:
        remedy = "an adapter is made one with: vector extract BASE BASE+ADAPTER -o v.safetensors"
        raise PlanError([f"{text}; {remedy}" for text in wrong])
    return named


def _model(one: Addend, weighted: bool) -> dict[str, Any]:
    """A recipe's entry. Where the method gives models weights and no common one is given, each counts once."""
    return {"model": one.path} | ({"parameters": {"weight": one.scale}} if weighted or one.scale != 1 else {})


def _check_one_base(vectors: Sequence[Vector]) -> None:
    first = vectors[0]
    for other in vectors[1:]:
        if not other.base.is_of(first.base):
            raise CheckpointError(
                f"{other.reference}: was made from {other.base.reference}, {first.reference} from another model, "
                f"{first.base.reference}. --rebase combines them all the same."
            )


def _over_zero(vectors: Sequence[Vector]) -> list[Checkpoint]:
    """Each vector as a model; what one of them doesn't change is zero there."""
    own = [vector.over_zero() for vector in vectors]
    everything: dict[str, TensorSpec] = {}
    problems: list[str] = []
    for vector, tensors in zip(vectors, own, strict=True):
        for name, spec in tensors.items():
            other = everything.setdefault(name, spec)
            if other.shape != spec.shape:
                problems.append(f"{name}: shape {list(spec.shape)} in {vector.reference}, but {list(other.shape)}")
    if problems:
        raise PlanError(problems)
    return [
        Checkpoint(
            vector.reference,
            vector.path,
            (vector.file,),
            {name: tensors.get(name) or _nothing(spec, vector.path) for name, spec in everything.items()},
        )
        for vector, tensors in zip(vectors, own, strict=True)
    ]


def _nothing(spec: TensorSpec, path: Path) -> TensorSpec:
    return from_zero(Delta(spec.name, spec.dtype, spec.shape), path)


def _zeros(models: Sequence[Checkpoint]) -> Checkpoint:
    """The base: zero everywhere. It takes its names and shapes, and no byte, from the first vector."""
    first = models[0]
    tensors = {name: replace(spec, change=Change(None, ())) for name, spec in first.tensors.items()}
    return replace(first, reference=ZERO, tensors=tensors)


def _written(vectors: Sequence[Vector]) -> dict[str, str]:
    """The dtype in which each tensor is written when the result is applied: the first vector's that tells."""
    written: dict[str, str] = {}
    for vector in vectors:
        for name, delta in vector.deltas.items():
            written.setdefault(name, delta.dtype)
    return written
