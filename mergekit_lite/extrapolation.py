"""Extrapolate a pair or a training run in one call: what the command ``extrapolate`` does, for Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.references import is_one_file, split_key
from mergekit_lite.engine.run import Finished, RunOptions, run
from mergekit_lite.errors import UsageError, nearest
from mergekit_lite.layout import OutputPath, output_path
from mergekit_lite.options import NewRows, Rounding, Width, finite_number, named_options
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import Recipe, Slice, Source
from mergekit_lite.recipe.recipe import BASE, UNION, Vocabulary
from mergekit_lite.recipe.rules import REGEX, Filter, Rule
from mergekit_lite.training_runs import run_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergekit_lite.checkpoint import Checkpoint


@named_options
def plan_extrapolation(
    sft: str | Path,
    aligned: str | Path,
    output: str | Path | None = None,
    alpha: float | Sequence[float] = (),
    *,
    alpha_for: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out_dtype: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    new_rows: NewRows = "refuse",
    tokenizer_source: str | None = None,
    width: Width = "base",
    shard_size: int | None = None,
    copy_code: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Plan ``out = aligned + alpha·(aligned − sft)``; see ``extrapolate`` for the arguments and errors.

    ``opened`` are models that are open already, by reference.
    """
    alphas = [finite_number(value) for value in (alpha if isinstance(alpha, Sequence) else [alpha])]
    if not alphas:
        raise UsageError("No alpha was given.")
    rules = tuple(Rule((finite_number(value),), _regex(pattern)) for pattern, value in (alpha_for or {}).items())
    recipe = Recipe(
        "expo",
        (Slice((Source(str(aligned)), Source(str(sft))), base=1),),
        base_model=str(sft),
        outputs=tuple({"alpha": (*rules, Rule((value,)))} for value in alphas),
        include=tuple(map(_regex, include)),
        exclude=tuple(map(_regex, exclude)),
        out_dtype=dtypes.output_named(out_dtype) if out_dtype else None,
        rounding=rounding,
        seed=seed,
        new_rows=new_rows,
        tokenizer=_tokenizer_source(tokenizer_source, str(sft), str(aligned)),
        vocabulary=Vocabulary(width=width),
    )
    paths = named_outputs(default_output(str(aligned)) if output is None else str(output), alphas, "alpha")
    return make_plan(recipe, paths, shard_size=shard_size, copy_code=copy_code, opened=opened, strict=True)


@named_options
def extrapolate(
    sft: str | Path,
    aligned: str | Path,
    output: str | Path | None = None,
    alpha: float | Sequence[float] = (),
    *,
    alpha_for: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out_dtype: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    new_rows: NewRows = "refuse",
    tokenizer_source: str | None = None,
    width: Width = "base",
    shard_size: int | None = None,
    copy_code: bool = False,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Make the models ``aligned + alpha·(aligned − sft)`` (ExPO, arXiv 2404.16792).

    Args:
        sft: the model before alignment: a path or hub reference.
        aligned: the model after; it gives the output its tensors, shards, dtypes, config and tokenizer.
        output: a folder, or a ``.safetensors`` / ``.pt`` file. ``{alpha}`` in it becomes the alpha; needed for
            several alphas. By default it is named after the aligned model and the alpha, in the working folder:
            ``dpo-expo-0.3.pt`` for ``runs/dpo.pt``, the folder ``dpo-expo-0.3`` for a folder or hub repository.
        alpha: one number, or several for as many outputs from one read of the inputs. 0 is ``aligned``, −1 is ``sft``.
        alpha_for: other alphas, by a regular expression that is searched in a tensor's name; the first match counts.
        include: regular expressions; only tensors whose names match one are extrapolated, the others copied.
        exclude: regular expressions; tensors whose names match one are copied from ``aligned``.
        out_dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``; by default each tensor's own in ``aligned``.
            ``fp8`` quantises the linear layers of attention and MLP by blocks of 128 × 128, as DeepSeek-V3 does, and
            writes the rest in bfloat16; for folders.
        rounding: ``nearest``, or ``stochastic``, which keeps steps smaller than the dtype's spacing, on average.
        seed: of the stochastic rounding.
        new_rows: ``copy`` takes vocabulary rows that only ``aligned`` has from there; ``refuse`` is an error.
        tokenizer_source: ``aligned``, ``base`` (that of ``sft``), one of the two references, or ``union``: rows of
            embedding and head follow their tokens, and the output has that tokenizer. By default rows stay, and the
            plan tells where they stand for different tokens.
        width: with ``tokenizer_source``, the rows of the output: those of the tokenizer's model (``base``), or the
            ``max`` or ``min`` of both.
        shard_size: most bytes of data in one file; by default the shards of ``aligned``.
        copy_code: copy the code of its own that a model in a folder has (``auto_map`` in its config); it is not run.
        **run_options: see ``RunOptions``.

    Returns:
        The outputs' paths, and for each a report with the effective alpha.

    Raises:
        UsageError: an option is wrong, or an output exists.
        CheckpointError: a model can't be opened.
        PlanError: the models don't fit together; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    planned = plan_extrapolation(
        sft,
        aligned,
        output,
        alpha,
        alpha_for=alpha_for,
        include=include,
        exclude=exclude,
        out_dtype=out_dtype,
        rounding=rounding,
        seed=seed,
        new_rows=new_rows,
        tokenizer_source=tokenizer_source,
        width=width,
        shard_size=shard_size,
        copy_code=copy_code,
    )
    return run(planned, **run_options)


@named_options
def plan_run_extrapolation(
    base: str | Path,
    checkpoints: str | Path | Sequence[str | Path],
    output: str | Path,
    to_step: float | Sequence[float],
    *,
    steps: Sequence[float] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out_dtype: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    shard_size: int | None = None,
    copy_code: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Plan the extrapolation of a training run; see ``extrapolate_run`` for the arguments and errors.

    ``opened`` are models that are open already, by reference.
    """
    targets = [finite_number(value, "to_step") for value in (to_step if isinstance(to_step, Sequence) else [to_step])]
    if not targets:
        raise UsageError("No to_step was given.")
    models, at = run_of(checkpoints, steps)
    sources = (Source(model, parameters={"step": (Rule((step,)),)}) for model, step in zip(models, at, strict=True))
    recipe = Recipe(
        "relex",
        (Slice((*sources, Source(str(base))), base=len(models)),),
        base_model=str(base),
        outputs=tuple({"to_step": (Rule((target,)),)} for target in targets),
        include=tuple(map(_regex, include)),
        exclude=tuple(map(_regex, exclude)),
        out_dtype=dtypes.output_named(out_dtype) if out_dtype else None,
        rounding=rounding,
        seed=seed,
    )
    paths = named_outputs(str(output), targets, "step")
    return make_plan(recipe, paths, shard_size=shard_size, copy_code=copy_code, opened=opened, strict=True)


@named_options
def plan_checkpoint(
    base: str,
    checkpoint: str,
    output: str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out_dtype: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    shard_size: int | None = None,
    copy_code: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Plan a checkpoint of a run as it is, in the form of the run's extrapolations; the arguments are theirs.

    All its weights are its own: ``include`` and ``exclude`` choose what is extrapolated, and nothing is.
    """
    recipe = Recipe(
        "wise_ft",
        (Slice((Source(checkpoint), Source(base)), base=1),),
        base_model=base,
        outputs=({"alpha": (Rule((1.0,)),)},),
        out_dtype=dtypes.output_named(out_dtype) if out_dtype else None,
        rounding=rounding,
        seed=seed,
    )
    paths = [output_path(str(output))]
    return make_plan(recipe, paths, shard_size=shard_size, copy_code=copy_code, opened=opened, strict=True)


@named_options
def extrapolate_run(
    base: str | Path,
    checkpoints: str | Path | Sequence[str | Path],
    output: str | Path,
    to_step: float | Sequence[float],
    *,
    steps: Sequence[float] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out_dtype: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    shard_size: int | None = None,
    copy_code: bool = False,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Go on along the line of a training run's checkpoints to later steps (RELEX, arXiv 2605.21468).

    Args:
        base: the model that the run began with, its step 0; it gives the outputs config and tokenizer.
        checkpoints: two or more; or a folder that holds them, or a pattern, ``run/step-*``.
        output: a folder or a file. ``{step}`` in it becomes the step; needed for several.
        to_step: the step to go on to, or several for as many outputs: one pass for statistics, and one over the inputs.
        steps: of the checkpoints, in their order; by default those in their names.
        include: regular expressions; only tensors whose names match one are extrapolated, the others copied.
        exclude: regular expressions; tensors whose names match one are copied from ``base``.
        out_dtype: as of ``extrapolate``, by default each tensor's own.
        rounding: as of ``extrapolate``.
        seed: as of ``extrapolate``.
        shard_size: as of ``extrapolate``, by default the shards of ``base``.
        copy_code: as of ``extrapolate``.
        **run_options: see ``RunOptions``.

    Returns:
        The outputs' paths, and for each a report with the share of variance that one line explains.

    Raises:
        UsageError: an option is wrong, the names tell no steps, or an output exists.
        CheckpointError, PlanError, RunError, NonFiniteError: as of ``extrapolate``.
    """
    planned = plan_run_extrapolation(
        base,
        checkpoints,
        output,
        to_step,
        steps=steps,
        include=include,
        exclude=exclude,
        out_dtype=out_dtype,
        rounding=rounding,
        seed=seed,
        shard_size=shard_size,
        copy_code=copy_code,
    )
    return run(planned, **run_options)


def default_output(aligned: str) -> str:
    """Return ``NAME-expo-{alpha}`` with the last part of the aligned model's name; a file keeps its suffix."""
    path, _ = split_key(aligned)
    if path.is_file() or is_one_file(aligned):
        return f"{path.stem}-expo-{{alpha}}{path.suffix}"
    name = path.resolve().name if path.exists() else path.name.partition("@")[0]
    return f"{name}-expo-{{alpha}}"


def named_outputs(output: str, numbers: Sequence[float], name: str) -> list[OutputPath]:
    """Return the path of each number's output, whose place in it is ``{name}``.

    Raises UsageError where several would have the same.
    """
    place = f"{{{name}}}"
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"The same {name} was given twice.")
    if len(numbers) > 1 and place not in output:
        raise UsageError(
            f"Several {name}s need several outputs: put {place} in the name, for instance -o {output}-{place}."
        )
    texts = [str(int(number)) if number.is_integer() else f"{number:g}" for number in numbers]  # no step is 1e+06
    return [output_path(output.replace(place, text)) for text in texts]


def _tokenizer_source(asked: str | None, sft: str, aligned: str) -> str | None:
    """Return a recipe's ``tokenizer_source``. Raises UsageError where it is none of the pair's."""
    known = ("aligned", BASE, UNION, sft, aligned)
    if asked is not None and asked not in known:
        listed = ", ".join(known[:3])
        raise UsageError(f"tokenizer_source expects {listed}, or SFT or ALIGNED, got {asked!r}.{nearest(asked, known)}")
    return aligned if asked == "aligned" else asked


def _regex(pattern: str) -> Filter:
    return Filter(REGEX + pattern)
