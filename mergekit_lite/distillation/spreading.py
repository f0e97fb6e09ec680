"""Answers of a model that each worker of a Ray cluster loads: the batches of a source, given to whoever is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.rows import Answer, Key
from mergekit_lite.engine.ray_workers import Cluster

Drawn: TypeAlias = tuple[list[Answer], dict[Key, str]]  # the answers of a batch, and what got no answer, with why


def spread(crew: Cluster, model: Local, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
    """Yield the answers to the ``wanted`` of the ``tasks``, batch by batch, as the workers have drawn them.

    Batches and their seeds are those of ``Local.answers``. This process doesn't load the model, and so doesn't know
    which prompts it refuses: there may be fewer batches than are asked for.

    Raises:
        CheckpointError: the model can't be loaded on a machine.
        RunError: a batch doesn't fit into memory, or no machine can do the work.
    """
    numbers = range(-(-len(tasks) // model.batch_size))
    for answers, lost in crew.run(numbers, lambda: _drawing(model, tasks, wanted)):
        model.failures.lost.update(lost)
        yield from answers


def _drawing(model: Local, tasks: Sequence[Task], wanted: frozenset[Key]) -> Callable[[int], Drawn]:
    """Return what draws a batch by its number, in a worker."""

    def draw(number: int) -> Drawn:
        return model.batch(tasks, wanted, number), model.failures.lost

    return draw
