"""Sparse upcycling: a dense model as the start of a mixture, every expert a copy of its MLPs, to be trained further.

Paper: Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", ICLR 2023, arXiv
2212.05055. All else is the dense model's; routers are drawn from U(−1/√hidden, 1/√hidden), as torch draws a linear
layer. The chosen experts' weights sum to 1, so a mixture of copies answers as the dense model does, whatever its
routers choose. Noise, N(0, noise²) added to each weight of each expert, is mergekit-moe's ``noise_scale``.

A family with a shared expert (Qwen2-MoE) adds that to the others, so here its down_proj begins as zeros: it adds
nothing until it is trained, and it can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.engine.run import Finished, RunOptions, run
from mergekit_lite.errors import PlanError, UsageError, counted, nearest
from mergekit_lite.mixtures.building.building import plan_moe
from mergekit_lite.mixtures.building.dense import families_named, kind_of
from mergekit_lite.mixtures.families import FAMILIES, Family
from mergekit_lite.options import named_options
from mergekit_lite.planning import Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

OF_KIND: Mapping[str, str] = {  # the family that a dense model becomes unless another is asked for
    "llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe", "olmo2": "flex_olmo",
}  # fmt: skip


@named_options
def plan_upcycle(
    model: str | Path,
    output: str | Path,
    *,
    experts: int = 8,
    experts_per_token: int = 2,
    family: str | None = None,
    noise: float = 0.0,
    dtype: str | None = None,
    seed: int = 0,
    shard_size: int | None = None,
) -> Plan:
    """Plan a mixture of copies of a dense model; see ``upcycle`` for the arguments and errors."""
    if not (math.isfinite(noise) and noise >= 0):
        raise UsageError(f"noise is a standard deviation, a number from 0 on, got {noise}.")
    if not 1 <= experts_per_token <= experts:
        of = counted(experts, "expert")
        raise UsageError(f"experts_per_token: of {of} expected 1 to {experts}, got {experts_per_token}.")
    if dtype is not None and dtypes.output_named(dtype) not in dtypes.FLOATS:
        raise UsageError(f"Mixtures are written in one of {', '.join(dtypes.FLOATS)}, got {dtype!r}.")
    if seed < 0:
        raise UsageError(f"seed is a whole number from 0 on, got {seed}.")
    model = str(model)
    chosen = _family(model, family)
    expert: dict[str, Any] = {"source_model": model} | ({"noise_scale": float(noise)} if noise else {})
    recipe: dict[str, Any] = {
        "base_model": model,
        "architecture": chosen.model_type,
        "gate_mode": "uniform_random",
        "experts_per_token": experts_per_token,
        "seed": seed,
        "experts": [dict(expert) for _ in range(experts)],
    }
    if dtype is not None:
        recipe["dtype"] = dtype
    if chosen.most_shared == 1:
        recipe["shared_experts"] = [{"source_model": model, "residual_scale": 0.0}]
    return plan_moe(recipe, output, shard_size=shard_size, equal_experts=True).plan


@named_options
def upcycle(
    model: str | Path,
    output: str | Path,
    *,
    experts: int = 8,
    experts_per_token: int = 2,
    family: str | None = None,
    noise: float = 0.0,
    dtype: str | None = None,
    seed: int = 0,
    shard_size: int | None = None,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Make a mixture of experts of one dense model, to be trained further.

    Args:
        model: the dense model: any reference.
        output: a folder.
        experts: in each layer.
        experts_per_token: how many of them a token goes through.
        family: ``mixtral``, ``qwen2_moe``, ``qwen3_moe``, ``flex_olmo`` or ``deepseek``, or how one begins, as
            ``architecture`` in a recipe; by default the one of the dense model's makers.
        noise: standard deviation of what is added to each weight of the experts.
        dtype: of the output; the model's by default.
        seed: of routers and noise.
        shard_size: most bytes of data in one file; 5 GB by default.
        **run_options: see ``RunOptions``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError: an option is wrong, or the output exists.
        CheckpointError: the model can't be opened.
        PlanError: the model doesn't fit the family; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    planned = plan_upcycle(
        model,
        output,
        experts=experts,
        experts_per_token=experts_per_token,
        family=family,
        noise=noise,
        dtype=dtype,
        seed=seed,
        shard_size=shard_size,
    )
    return run(planned, **run_options)


def _family(model: str, name: str | None) -> Family:
    """Return the family that is asked for, or that a model becomes. Raises UsageError, CheckpointError, PlanError."""
    named = families_named(name)
    if not named:
        known = [family.model_type for family in families_named(None)]
        raise UsageError(f"Unknown family {name!r}.{nearest(str(name), known)} Known: {', '.join(known)}.")
    if len(named) == 1:
        return named[0]
    kind = kind_of(open_checkpoint(model))
    own = FAMILIES.get(OF_KIND.get(kind, ""))
    if own in named:
        return own
    if name is not None:  # whoever plans it tells why none of them fits
        return named[0]
    raise PlanError([f"{model} is of type {kind or 'unknown'}: mixtures are made of {', '.join(OF_KIND)}"])
