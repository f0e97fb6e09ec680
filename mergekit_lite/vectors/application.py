"""Application of task vectors and adapters to a model: a recipe of one line, carried out like any merge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.references import is_one_file, parse_addition
from mergekit_lite.engine.run import Finished, RunOptions, run
from mergekit_lite.errors import UsageError
from mergekit_lite.options import Rounding, named_options
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import parse, to_yaml

if TYPE_CHECKING:
    from typing_extensions import Unpack


@named_options
def plan_apply(
    base: str | Path,
    vectors: Sequence[str],
    output: str | Path,
    *,
    rebase: bool = False,
    dtype: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    shard_size: int | None = None,
    copy_code: bool = False,
) -> Plan:
    """Plan ``base + Σ scale · vector``; see ``apply_vectors`` for the arguments and errors."""
    if not vectors:
        raise UsageError("No task vector was given: mergekit-lite vector apply BASE v.safetensors:0.5 -o OUT.")
    added = [parse_addition(str(text)) for text in vectors]
    if rebase:
        added = [one._replace(rebase=True) if is_one_file(one.path) else one for one in added]
    recipe: dict[str, Any] = {
        "merge_method": "passthrough",
        "models": [{"model": "+".join([str(base), *map(str, added)])}],
    }
    if dtype is not None:
        recipe["out_dtype"] = dtypes.float_named(dtype)
    if rounding != "nearest":
        recipe |= {"rounding": rounding, "seed": seed}
    text = to_yaml(recipe)
    return make_plan(parse(text), [output], shard_size=shard_size, copy_code=copy_code, text=text)


@named_options
def apply_vectors(
    base: str | Path,
    vectors: Sequence[str],
    output: str | Path,
    *,
    rebase: bool = False,
    dtype: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    shard_size: int | None = None,
    copy_code: bool = False,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Make the model ``base + Σ scale · vector``: summed in float64, rounded once.

    Args:
        base: the model: any reference.
        vectors: task vectors (files) and LoRA adapters (folders, hub repositories), each ``PATH`` or ``PATH:SCALE``.
        output: a folder, or a ``.safetensors`` / ``.pt`` file.
        rebase: add vectors to another base than the one they were made from.
        dtype: of all float tensors; by default that of the tuned model.
        rounding: ``nearest``, or ``stochastic``, which keeps steps smaller than the dtype's spacing, on average.
        seed: of the stochastic rounding.
        shard_size: most bytes of data in one file; by default the shards of ``base``.
        copy_code: copy the code of its own that a model in a folder has (``auto_map`` in its config); it is not run.
        **run_options: see ``RunOptions``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError: an option is wrong, or the output exists.
        CheckpointError: a vector can't be opened, doesn't fit, or was made from another base.
        PlanError: model and vectors don't fit together; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    planned = plan_apply(
        base,
        vectors,
        output,
        rebase=rebase,
        dtype=dtype,
        rounding=rounding,
        seed=seed,
        shard_size=shard_size,
        copy_code=copy_code,
    )
    return run(planned, **run_options)
