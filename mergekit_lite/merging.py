"""Merge in one call: what the command ``merge`` does, for Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.engine.run import Finished, RunOptions, run
from mergekit_lite.multimerge import merge_documents, plan_documents
from mergekit_lite.options import named_options
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import Recipe, as_data, lasting_text, parse, text_of, to_yaml
from mergekit_lite.recipe.documents import parse_documents

if TYPE_CHECKING:
    from typing_extensions import Unpack


@named_options
def plan_merge(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path,
    *,
    shard_size: int | None = None,
    copy_code: bool = False,
) -> Plan:
    """Plan a recipe; see ``merge`` for the arguments and errors."""
    if isinstance(recipe, Recipe):
        text = to_yaml(as_data(recipe))
        return make_plan(recipe, [output], shard_size=shard_size, copy_code=copy_code, text=text)
    if isinstance(recipe, Mapping):
        text, source = to_yaml(recipe), "The recipe"
    else:
        text, source = text_of(Path(recipe)), str(recipe)
    parsed = parse(text, source)
    text = lasting_text(parsed, text)
    return make_plan(parsed, [output], shard_size=shard_size, copy_code=copy_code, text=text)


@named_options
def merge(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path,
    *,
    shard_size: int | None = None,
    copy_code: bool = False,
    keep: bool = False,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Merge models as a recipe says.

    Args:
        recipe: a YAML file in mergekit's language, of one document or several; one as a mapping, or a ``Recipe``.
        output: a folder, or a ``.safetensors`` or ``.pt`` file; with ``{name}`` in it where several documents of a
            file are used by no other one.
        shard_size: most bytes of data in one file.
        copy_code: copy the code of its own that a model in a folder has (``auto_map`` in its config); it is not run.
        keep: of a file of several documents, keep what lies in between for the next run.
        **run_options: see ``RunOptions``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError: the recipe is wrong, with every problem's line and column, or the output exists.
        CheckpointError: a model can't be opened.
        PlanError: the models don't fit together; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    if isinstance(recipe, str | Path):
        documents = parse_documents(text_of(Path(recipe)), str(recipe))
        if len(documents) > 1:
            resume = run_options.get("resume", False)
            steps = plan_documents(
                documents, output, shard_size=shard_size, copy_code=copy_code, keep=keep, resume=resume
            )
            return _joined([made for step, made in merge_documents(steps, keep=keep, **run_options) if step.is_final])
    return run(plan_merge(recipe, output, shard_size=shard_size, copy_code=copy_code), **run_options)


def _joined(made: Iterable[Finished | None]) -> Finished:
    """Return several results as one."""
    there = [each for each in made if each is not None]
    outputs = tuple(path for each in there for path in each.outputs)
    reports = tuple(report for each in there for report in each.reports)
    return Finished(outputs, reports, sum(each.seconds for each in there))
