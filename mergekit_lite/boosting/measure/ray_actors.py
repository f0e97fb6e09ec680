"""Workers as actors on the machines of a Ray cluster, one for each processor or GPU.

A machine gets none if it has another version than ours, doesn't see the models, or not the folder that the search was
started in. Rows come one by one, as Ray streams what an actor yields.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.boosting.candidates.candidate import Job
from mergekit_lite.boosting.measure.workers import MEMORY, STOP_SECONDS, Maker, Measurer, answers
from mergekit_lite.engine.processes import sendable
from mergekit_lite.engine.ray_machine import RayWorker
from mergekit_lite.engine.ray_workers import MOST_LOSSES, PATIENCE, Cluster
from mergekit_lite.errors import RunError, counted, listing


class RayMeasurer(RayWorker):
    """A worker in its process, in the folder that the search was started in, with the modules that are found there."""

    def __init__(self, folder: str, paths: Sequence[str]) -> None:
        super().__init__()
        sys.path += [path for path in paths if path not in sys.path]
        self._maker: Maker | None = None
        self._measure: Measurer | None = None
        self._unseen = ""
        try:
            os.chdir(folder)
        except OSError as error:
            where = f"the folder {folder} ({error.strerror})"
            self._unseen = f"doesn't see {where}. It has to be on a file system that all machines share"

    def look(self, needs: bytes) -> str:
        """Return what keeps this machine from measuring; empty where nothing does."""
        return self._unseen or super().look(needs)

    def measure(self, maker: bytes, job: bytes) -> Iterator[bytes]:
        """Do a job, and yield its answers, pickled; the maker is entered for the first one."""
        try:
            if self._measure is None:
                self._maker = pickle.loads(maker)
                self._measure = self._maker.__enter__()
        except BaseException as failure:
            yield pickle.dumps((None, sendable(failure)))
            return
        for answer in answers(self._measure, pickle.loads(job)):
            yield pickle.dumps(answer)

    def stop(self) -> None:
        """Free what the maker opened."""
        if self._maker is not None:
            self._maker.__exit__(None, None, None)


@dataclass
class RayActors:
    """Places on a cluster; it is connected, and what machines have to see is said."""

    cluster: Cluster
    memory: int  # bytes that each worker takes at least, of the machine's
    most: int | None  # workers; None for all there are places for
    note: Callable[[str], None]  # is told of machines that are left out
    _living: list[RayLine] = field(default_factory=list, init=False)
    _fit: list[RayLine] = field(default_factory=list, init=False)  # those of them that have no seat yet

    def fill(self) -> int:
        """Start a worker in every place, and return the number of those that are fit.

        Raises:
            RunError: no machine of the cluster can do this.
        """
        self._fit = self._started(self.most)
        if self._fit:
            if self.most is not None and len(self._fit) < self.most:
                self.note(f"the Ray cluster has places for {len(self._fit)} of {self.most} workers")
            return len(self._fit)
        refused = [f"{node.name}: {node.refused}" for node in self.cluster.nodes.values() if node.refused]
        title = f"Ray: no machine of the cluster can measure; each worker needs {self.memory / 1e9:.2f} GB of memory"
        raise RunError(listing(title, refused) if refused else f"{title}.")

    def free(self) -> int:
        """Return how many more workers could be started now."""
        return len(self._fit) + len(self._open())

    def start(self, worker: int, maker: Maker) -> RayLine | None:
        """Give a seat to a worker that is there, or start one; None where there is no place for it."""
        line = next(iter(self._fit or self._started(1)), None)
        if line is not None:
            self._fit = [other for other in self._fit if other is not line]
            line.sit(maker)
        return line

    def _open(self) -> list[str]:
        """Return a node for each worker that could be started, so that few of them are spread."""
        at_work = Counter(line.node for line in self._living)
        free = [
            ((at_work[node] + more) / count, node)
            for node, count in self.cluster.places(0 if self.cluster.gpus else self.memory)
            for more in range(count - at_work[node])
        ]
        return [node for _, node in sorted(free)]

    def _started(self, most: int | None) -> list[RayLine]:
        """Start workers, and return those that are fit once all have looked around or nobody waits longer."""
        import ray

        lines = {}
        for node in self._open()[:most]:
            actor = self.cluster.started(node, RayMeasurer, os.getcwd(), sys.path)  # noqa: PTH109
            line = RayLine(actor, node, self.cluster.nodes[node].name, self._living)
            lines[self.cluster.looking(actor)] = line
        done: list[Any] = ray.wait(list(lines), num_returns=len(lines), timeout=PATIENCE)[0] if lines else []
        return [line for looked, line in lines.items() if self._is_fit(line, looked if looked in done else None)]

    def _is_fit(self, line: RayLine, looked: Any) -> bool:
        """Return whether a worker can measure; else end it, and say why. ``looked``: what it answered, or None."""
        import ray

        node = self.cluster.nodes[line.node]
        if looked is None:
            line.end()
            self.note(f"no worker could be started on {node.name} in {PATIENCE} seconds: others may use the processors")
            return False
        try:
            why = ray.get(looked)
        except ray.exceptions.RayError:
            line.end()
            node.losses += 1
            if node.losses <= MOST_LOSSES:
                return False  # the machine died, or may do better the next time
            why = f"lost {counted(node.losses, 'worker')} as they started"
        if why:
            line.end()
            if not node.refused:
                node.refused = why
                self.note(f"{node.name} was left out: it {why}.")
            return False
        node.losses = 0
        return True


class RayLine:
    """One worker, as the search's process sees it."""

    def __init__(self, actor: Any, node: str, name: str, living: list[RayLine]) -> None:
        self.node = node
        self.name = f"on {name}"
        self._actor = actor
        self._maker: Any = None  # reference of what makes its function, packed
        self._streams: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of answers, one for each job; None at the end
        self._stopping: Any = None
        self._how = "ended early"
        self._living = living  # which it is one of
        living.append(self)

    @property
    def machine_died(self) -> bool:
        """Whether its machine is no part of the cluster any more."""
        import ray

        nodes: Any = ray.nodes  # has no types
        return not any(node["NodeID"] == self.node and node["Alive"] for node in nodes())

    def sit(self, maker: Maker) -> None:
        """Say what it measures by."""
        import ray

        self._maker = ray.put(pickle.dumps(maker))

    def give(self, job: Job) -> None:
        """Send a job."""
        streaming = self._actor.measure.options(num_returns="streaming")
        self._streams.put(streaming.remote(self._maker, pickle.dumps(job)))

    def answers(self) -> Iterator[bytes]:
        """Yield what it sends, until it has ended."""
        import ray

        while (stream := self._streams.get()) is not None:
            try:
                for reference in stream:
                    yield ray.get(reference)
            except ray.exceptions.RayTaskError as error:  # our mistake, no death
                yield pickle.dumps((None, RuntimeError(f"in a worker:\n{error}")))
            except ray.exceptions.OutOfMemoryError:
                self._how = f"was ended by Ray. {MEMORY}".rstrip(".")
                return
            except ray.exceptions.RayError:
                return

    def ask_to_stop(self) -> None:
        """Have it stop its servers."""
        self._stopping = self._actor.stop.remote()

    def end(self) -> str:
        """End it, and return how it ended."""
        import ray

        with suppress(ray.exceptions.RayError):
            if self._stopping is not None:
                ray.get(self._stopping, timeout=STOP_SECONDS)
        with suppress(Exception):
            ray.kill(self._actor)
        self._streams.put(None)
        with suppress(ValueError):
            self._living.remove(self)
        return self._how
