"""Merge in one call: what the command ``merge`` does, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.planning import Plan
from mergekit_lite.planning.planner import method_parameters, plan_merge
from mergekit_lite.recipe import parse, text_of

if TYPE_CHECKING:
    from mergekit_lite.engine.run import Finished


def plan_merge_file(recipe: str | Path, output: str | Path, *, shard_size: int | None = None) -> Plan:
    """Plan the recipe in a YAML file; see ``merge`` for the arguments and errors."""
    path = Path(recipe)
    text = text_of(path)
    return plan_merge(parse(text, method_parameters(), str(path)), output, shard_size=shard_size, text=text)


def merge(recipe: str | Path, output: str | Path, *, shard_size: int | None = None, **how: Any) -> Finished:
    """Merge models as a recipe says.

    Args:
        recipe: a YAML file in mergekit's language.
        output: a folder, or a ``.safetensors`` or ``.pt`` file.
        shard_size: most bytes of data in one file.
        how: of ``run`` (``threads``, ``device``, ``resume``, ``force``, ``allow_nonfinite``, ``progress``,
            ``processes``).

    Raises:
        MergekitLiteError: one of its kinds, as ``plan_merge`` and ``run`` say.
    """
    from mergekit_lite.engine.run import run

    return run(plan_merge_file(recipe, output, shard_size=shard_size), **how)
