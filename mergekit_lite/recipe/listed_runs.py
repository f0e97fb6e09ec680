"""Entries of a recipe that stand for the checkpoints of a training run: ``run: grpo/step-*``."""

from __future__ import annotations

from mergekit_lite.errors import UsageError
from mergekit_lite.recipe.values import Remarks, text, whole
from mergekit_lite.training_runs import checkpoints_of, steps_of
from mergekit_lite.yaml_document import Node, Remark


def checkpoints(run: Node, last: Node | None, problems: Remarks) -> list[tuple[str, int]]:
    """Return a run's checkpoints with their steps, all or the last ones; none where it is wrong."""
    name = text(run, "run", problems)
    most = whole(last, "last", 1, problems) if last is not None else None
    try:
        found = checkpoints_of(name) if name else []
        steps = steps_of(found)
    except UsageError as error:
        problems.append(Remark(run.at, str(error)))
        return []
    if most is not None and found and most > len(found):
        problems.append(Remark(run.at, f"{name!r} has {len(found)} checkpoints, 'last' asks for {most}"))
    return list(zip(found, steps, strict=True))[-(most or len(found)) :]
