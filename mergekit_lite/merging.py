"""Merge in one call: what the command ``merge`` does, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.engine.run import Finished, RunOptions, run
from mergekit_lite.options import named_options
from mergekit_lite.planning import Plan
from mergekit_lite.planning.planner import method_parameters, plan_merge
from mergekit_lite.recipe import parse, text_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@named_options
def plan_merge_file(recipe: str | Path, output: str | Path, *, shard_size: int | None = None) -> Plan:
    """Plan the recipe in a YAML file; see ``merge`` for the arguments and errors."""
    path = Path(recipe)
    text = text_of(path)
    return plan_merge(parse(text, method_parameters(), str(path)), output, shard_size=shard_size, text=text)


@named_options
def merge(
    recipe: str | Path, output: str | Path, *, shard_size: int | None = None, **run_options: Unpack[RunOptions]
) -> Finished:
    """Merge models as a recipe says.

    Args:
        recipe: a YAML file in mergekit's language.
        output: a folder, or a ``.safetensors`` or ``.pt`` file.
        shard_size: most bytes of data in one file.
        **run_options: see ``RunOptions``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError: the recipe is wrong, with every problem's line and column, or the output exists.
        CheckpointError: a model can't be opened.
        PlanError: the models don't fit together; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    return run(plan_merge_file(recipe, output, shard_size=shard_size), **run_options)
