"""Combination of task vectors by any method of the recipes: each is taken for a model over a base of zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.encodings.sum import Sum
from mergekit_lite.checkpoint.references import Addition, is_one_file, parse_addition
from mergekit_lite.checkpoint.vector_file import TOKENS, Delta, Vector, check_output, described, difference, open_vector
from mergekit_lite.engine.run import Finished, RunOptions, run
from mergekit_lite.errors import CheckpointError, PlanError, UsageError
from mergekit_lite.layout import output_path, safetensors_layout
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
    path = output_path(output)
    check_output(path)
    if not vectors:
        raise UsageError("No task vector was given: mergekit-lite vector combine --method ties a b -o v.safetensors.")
    named = [parse_addition(str(text)) for text in vectors]
    _check_files(named)
    opened = [open_vector(one.path) for one in named]
    if not rebase:
        _check_one_base(opened)
    tokens = _tokens(opened)
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
    written = _written_dtypes(opened)
    about = {job.name: (written[job.name], job.shape) for job in plan.jobs}
    metadata = described("dense", opened[0].base, about) | tokens
    manifest_recipe = {**plan.recipes[0], "combines": [str(one) for one in named]}
    return replace(plan, recipes=(manifest_recipe,), layout=safetensors_layout([plan.jobs], [path.name], metadata))


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


def _check_files(named: Sequence[Addition]) -> None:
    """Raise PlanError where a vector is no file."""
    wrong = [f"{one.path}: is not a file" for one in named if not is_one_file(one.path)]
    if wrong:
        remedy = (
            "adapters are combined among themselves with --space core (combine_adapters in Python), or made vectors "
            "with: vector extract BASE BASE+ADAPTER -o v.safetensors"
        )
        raise PlanError([f"{text}; {remedy}" for text in wrong])


def _model(one: Addition, weighted: bool) -> dict[str, Any]:
    """Return a model's entry in the recipe, with its weight where the method takes weights (1 by default)."""
    return {"model": one.path} | ({"parameters": {"weight": one.scale}} if weighted or one.scale != 1 else {})


def _check_one_base(vectors: Sequence[Vector]) -> None:
    """Raise CheckpointError where vectors were made from different bases."""
    first = vectors[0]
    for other in vectors[1:]:
        if not other.base.is_of(first.base):
            raise CheckpointError(
                f"{other.reference}: was made from {other.base.reference}, {first.reference} from another model, "
                f"{first.base.reference}. --rebase combines them all the same."
            )


def _tokens(vectors: Sequence[Vector]) -> dict[str, str]:
    """Return the entry of the metadata that says whose the rows are. Raises CheckpointError where vectors disagree."""
    known = {vector.tokens: vector.reference for vector in reversed(vectors) if vector.tokens}
    if len(known) > 1:
        raise CheckpointError(
            f"{' and '.join(known.values())}: their rows of embedding and head are of different tokens. Extract both "
            "with --tokenizer-source base."
        )
    return dict.fromkeys([TOKENS] * len(known), next(iter(known), ""))


def _over_zero(vectors: Sequence[Vector]) -> list[Checkpoint]:
    """Return each vector as a model; a tensor that a vector doesn't change is zero in its model."""
    over_zero = [vector.differences() for vector in vectors]
    specs: dict[str, TensorSpec] = {}  # of every tensor that any vector changes
    problems: list[str] = []
    for vector, tensors in zip(vectors, over_zero, strict=True):
        for name, spec in tensors.items():
            other = specs.setdefault(name, spec)
            if other.shape != spec.shape:
                problems.append(f"{name}: shape {list(spec.shape)} in {vector.reference}, but {list(other.shape)}")
    if problems:
        raise PlanError(problems)
    return [
        Checkpoint(
            vector.reference,
            vector.path,
            (vector.file,),
            {name: tensors.get(name) or _zero_tensor(spec, vector.path) for name, spec in specs.items()},
        )
        for vector, tensors in zip(vectors, over_zero, strict=True)
    ]


def _zero_tensor(spec: TensorSpec, path: Path) -> TensorSpec:
    """Return a tensor of zeros of the shape and dtype of another."""
    return difference(Delta(spec.name, spec.dtype, spec.shape), path)


def _zeros(models: Sequence[Checkpoint]) -> Checkpoint:
    """Return the base, which is zero everywhere; its names and shapes are those of the first vector."""
    first = models[0]
    tensors = {name: replace(spec, encoding=Sum(None)) for name, spec in first.tensors.items()}
    return replace(first, reference=ZERO, tensors=tensors)


def _written_dtypes(vectors: Sequence[Vector]) -> dict[str, str]:
    """Return the dtype in which applying the result writes each tensor: that of the first vector which changes it."""
    dtype_of: dict[str, str] = {}
    for vector in vectors:
        for name, delta in vector.deltas.items():
            dtype_of.setdefault(name, delta.dtype)
    return dtype_of
