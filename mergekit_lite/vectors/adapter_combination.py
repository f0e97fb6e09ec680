"""Combination of LoRA adapters, the result an adapter: any method of the recipes, in a space that they have in common.

Each module is by itself: its factors are read, its products brought into the space (``spaces``), merged there by the
method over a base of zeros, and written as factors with the scale 1. What an adapter doesn't change is zero in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.engine.schedule import Progress
from mergekit_lite.methods.in_memory import merge_tensors
from mergekit_lite.options import named_options
from mergekit_lite.vectors.adapter_plan import AdapterPlan, plan_adapters
from mergekit_lite.vectors.adapter_writing import AdapterModule, read_product, write_adapter
from mergekit_lite.vectors.extracted import Extracted
from mergekit_lite.vectors.spaces import Cut, SpaceName, core_space, knots_space


@named_options
def combine_adapters(
    adapters: Sequence[str],
    output: str | Path,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    space: SpaceName = "core",
    rank: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
    force: bool = False,
    sync: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Combine LoRA adapters of one base into one, by a method that works on their products, never on A and B apart.

    Args:
        adapters: folders or hub repositories, each ``PATH`` or ``PATH:WEIGHT`` where the method gives every model a
            weight; of any ranks, alphas and patterns, rsLoRA too.
        output: a folder.
        method: any method of the recipes; the base of those that need one is zero.
        parameters: the method's, for all modules.
        space: ``core`` (Panariello et al. 2025, arXiv 2509.17786) or ``knots`` (Stoica et al. 2024, arXiv 2410.19735):
            what the method sees of each product (see ``spaces``).
        rank: cut the result of each module to this rank; None for the sum of the ranks, with nothing lost.
        dtype: of the result.
        seed: of methods that draw.
        threads: workers; one for each core by default.
        resume: go on with what an earlier run of the same combination left.
        force: replace an existing output, and drop what an earlier run left unless ``resume`` is set too.
        sync: bring the output to the disk before it gets its name, and its name after.
        progress: called with (bytes read, bytes in all) after each module.

    Returns:
        The output's path, its bytes, and for each module the length of the product and what the rank cut off.

    Raises:
        UsageError: an option, the method or a parameter is wrong, or the output exists.
        CheckpointError: an adapter can't be opened.
        PlanError: adapters don't fit together, or hold what is no product (DoRA, experts, tensors in full); every
            problem is named.
        NonFiniteError: a factor, or the result in its dtype, is NaN or infinite.
        RunError: reading or writing failed.
    """
    plan = plan_adapters(adapters, output, method, parameters, space=space, rank=rank, dtype=dtype, seed=seed)
    return run_adapters(plan, threads=threads, resume=resume, force=force, sync=sync, progress=progress)


def run_adapters(plan: AdapterPlan, **how: Any) -> Extracted:
    """Carry out a plan; see ``combine_adapters`` for what else it takes."""
    return write_adapter(plan, partial(_combined, plan), **how)


def _combined(plan: AdapterPlan, module: AdapterModule, reader: Reader) -> Cut:
    """Combine one module."""
    products = [None if part is None else read_product(part, reader) for part in module.parts]
    space = (core_space if plan.space == "core" else knots_space)([one for one in products if one is not None])
    own = iter(space.tasks)
    nothing = torch.zeros_like(space.tasks[0])
    tasks = [nothing if one is None else next(own) for one in products]
    base = None if plan.method.merges_base else nothing
    weight = f"{module.name}.weight"
    merged = merge_tensors(plan.method.name, base, tasks, tensor_name=weight, seed=plan.seed, **plan.parameters)
    return space.outside(merged, module.rank)
