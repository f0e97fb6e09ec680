"""A mixture built in one call: what the command ``moe`` does, for Python; and made again, for ``verify``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.engine.devices import chosen_devices
from mergekit_lite.engine.run import Finished, RunOptions, check_outputs, run
from mergekit_lite.layout import OutputPath
from mergekit_lite.mixtures.building.planning import MixturePlan, plan_mixture
from mergekit_lite.mixtures.building.recipe import parse
from mergekit_lite.options import named_options
from mergekit_lite.planning import Plan
from mergekit_lite.recipe import text_of, to_yaml

if TYPE_CHECKING:
    from typing_extensions import Unpack


@named_options
def plan_moe(
    recipe: str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    shard_size: int | None = None,
    equal_experts: bool = False,
) -> MixturePlan:
    """Plan a mixture; see ``build_moe`` for the arguments and errors."""
    if isinstance(recipe, Mapping):
        text, source = to_yaml(recipe), "The recipe"
    else:
        text, source = text_of(Path(recipe)), str(recipe)
    parsed = parse(text, source, equal_experts=equal_experts)
    return plan_mixture(parsed, output, text=text, shard_size=shard_size, equal_experts=equal_experts)


def with_routers(planned: MixturePlan, device: str = "cpu", threads: int | None = None) -> tuple[Plan, str]:
    """Return the plan with the rows of its routers, computed if they are to be; and a warning about them, or nothing.

    Raises:
        UsageError, CheckpointError, RunError: as ``make_routers`` says.
    """
    if not planned.needs_rows:
        return planned.plan, ""
    from mergekit_lite.mixtures.building.routers import make_routers  # with torch, and transformers

    routers = make_routers(planned, device, threads)
    return planned.with_rows(routers.rows), routers.warning


@named_options
def build_moe(
    recipe: str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    shard_size: int | None = None,
    equal_experts: bool = False,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Build a mixture of experts from dense models.

    Args:
        recipe: a YAML file of mergekit-moe, or one as a mapping.
        output: a folder, or a ``.safetensors`` or ``.pt`` file.
        shard_size: most bytes of data in one file; 5 GB by default.
        equal_experts: accept experts that are all the same model, for a mixture that is trained further.
        **run_options: see ``RunOptions``. The base model runs on the first device for ``gate_mode: hidden``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError: the recipe is wrong, with every problem's line and column, or the output exists.
        CheckpointError: a model can't be opened.
        PlanError: the models don't fit together, or no family of mixtures fits them; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    planned = plan_moe(recipe, output, shard_size=shard_size, equal_experts=equal_experts)
    force, resume = run_options.get("force", False), run_options.get("resume", False)
    check_outputs(planned.plan, resume=resume, force=force)
    plan, _ = with_routers(planned, chosen_devices(run_options.get("device", "cpu"))[0], run_options.get("threads"))
    return run(plan, **run_options)


def mixture_again(
    recipe: Mapping[str, Any],
    output: OutputPath,
    opened: Mapping[str, Checkpoint],
    shard_size: int | None,
    written: Mapping[str, TensorSpec],
) -> Plan:
    """Make the plan of an output again, from its manifest's recipe, its opened inputs and its own routers.

    Rows that were computed are not computed again: they are the output's, and their digest has to be the plan's.

    Raises:
        MergekitLiteError: the recipe is not one, or the inputs don't fit it any more.
    """
    text = recipe.get("text")
    equal = recipe.get("equal_experts") is True
    parsed = parse(text if isinstance(text, str) else "", "The manifest's recipe", equal_experts=equal)
    planned = plan_mixture(parsed, output, text=str(text), shard_size=shard_size, opened=opened, equal_experts=equal)
    if not planned.needs_rows:
        return planned.plan
    shapes = {job.name: (job.dtype, job.shape) for job in planned.plan.jobs}
    with Reader() as reader:
        rows = {name: _bytes_of(written[name], reader) for name in planned.routers
                if name in written and (written[name].dtype, written[name].shape) == shapes[name]}  # fmt: skip
    return planned.with_rows(rows)


def _bytes_of(spec: TensorSpec, reader: Reader) -> bytes:
    values = bytearray(spec.nbytes)
    spec.fill(reader, 0, memoryview(values))
    return bytes(values)
