"""Answers of a model that each worker of a Ray cluster loads: the batches of a model, given to whoever is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeAlias

from mergekit_lite.answers.asked_model import AskedModel
from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.offline import Offline
from mergekit_lite.answers.rows import Answer, Key
from mergekit_lite.answers.server import Served
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.ray_cluster import check_address, workers_of
from mergekit_lite.engine.ray_workers import Cluster

Drawn: TypeAlias = tuple[list[Answer], dict[Key, str]]  # the answers of a batch, and what got no answer, with why


@dataclass
class Crews:
    """The workers that models are spread over: one crew for models without a GPU, one for those that name a GPU.

    A crew is connected when it is first asked, and leaves with the context. ``ray`` is ``auto``, ``HOST:PORT``,
    ``local:N``, or None: then nothing is spread.
    """

    ray: str | None
    _crews: dict[str, Cluster | None] = field(default_factory=dict, init=False)
    _opened: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Crews:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._crews.clear()
        self._opened.close()

    def answers(
        self, who: Served | Local, device: str | None, tasks: Sequence[Task], wanted: frozenset[Key]
    ) -> Iterator[Answer]:
        """Yield what ``who.answers(tasks, wanted)`` does; where it can be, by the workers.

        vLLM has workers of its own, and a server none: these answer as without a cluster.

        Args:
            who: the model.
            device: that it names, or None.
            tasks: all of the run.
            wanted: those that are not there yet.

        Raises:
            UsageError: no such cluster is there, or no machine of it has a GPU that the model needs.
            CheckpointError: the model can't be loaded.
            RunError: a batch doesn't fit into memory, or no machine can do the work.
        """
        crew = self._of(device) if isinstance(who, Local) and not isinstance(who, Offline) and wanted else None
        if crew is None or not isinstance(who, Local):
            return who.answers(tasks, wanted)
        return _spread(crew, who, tasks, wanted)

    def _of(self, device: str | None) -> Cluster | None:
        kind = CPU if device in (None, CPU) else "cuda"  # a GPU for each worker where the model names one
        if kind not in self._crews:
            self._crews[kind] = self._opened.enter_context(workers_of(self.ray, kind, threads=1))
        return self._crews[kind]


def check_ray(ray: str, models: Sequence[AskedModel]) -> str | None:
    """Return a remark where there is nothing to spread.

    Raises:
        UsageError: the address can't be one, or Ray is missing.
    """
    check_address(ray, CPU)
    if any(not model.is_served and model.engine == "transformers" for model in models):
        return None
    return f"--ray {ray}: nothing is spread over machines, for no model answers in this process by transformers"


def _spread(crew: Cluster, model: Local, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
    """Yield the answers to the ``wanted`` of the ``tasks``, batch by batch, as the workers have drawn them.

    Batches and their seeds are those of ``Local.answers``. This process doesn't load the model, and so doesn't know
    which prompts it refuses: there may be fewer batches than are asked for.
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
