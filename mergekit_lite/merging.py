"""Merge in one call: what the command ``merge`` does, for Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import Recipe, as_data, parse, text_of, to_yaml

if TYPE_CHECKING:
    from mergekit_lite.engine.run import Finished


def plan_merge(
    recipe: str | Path | Mapping[str, Any] | Recipe, output: str | Path, *, shard_size: int | None = None
) -> Plan:
    """Plan a recipe; see ``merge`` for the arguments and errors."""
    if isinstance(recipe, Recipe):
        return make_plan(recipe, [output], shard_size=shard_size, text=to_yaml(as_data(recipe)))
    if isinstance(recipe, Mapping):
        text, source = to_yaml(recipe), "The recipe"
    else:
        text, source = text_of(Path(recipe)), str(recipe)
    return make_plan(parse(text, source), [output], shard_size=shard_size, text=text)


def merge(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path,
    *,
    shard_size: int | None = None,
    **how: Any,
) -> Finished:
    """Merge models as a recipe says.

    Args:
        recipe: a YAML file in mergekit's language, the same as a mapping, or a ``Recipe``.
        output: a folder, or a ``.safetensors`` or ``.pt`` file.
        shard_size: most bytes of data in one file.
        how: of ``run`` (``threads``, ``device``, ``resume``, ``force``, ``allow_nonfinite``, ``progress``,
            ``processes``).

    Raises:
        MergekitLiteError: one of its kinds, as ``make_plan`` and ``run`` say.
    """
    from mergekit_lite.engine.run import run

    return run(plan_merge(recipe, output, shard_size=shard_size), **how)
