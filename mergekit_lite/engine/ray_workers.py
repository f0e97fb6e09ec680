"""Workers on the machines of a Ray cluster, with the contract of ``processes.forked``.

There is one worker for each processor of the cluster, or one for each GPU with several threads, as Ray counts them.
What the tasks are done by is packed once and kept in Ray's object store; a task is sent packed, like what comes back.
Weights never travel through Ray: workers read the inputs and write the output by their paths, on a file system that all
machines share. Whether a machine sees them, and is of our version, each worker finds out before it gets a task.

A worker that is lost is replaced, and its tasks are given to others. What one is at for very long, an idle one does,
too. That is safe, even if both write: what they write are the same bytes in the same places.
"""

from __future__ import annotations

import pickle
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from mergekit_lite._version import __version__
from mergekit_lite.engine.processes import packed
from mergekit_lite.engine.ray_head import head_of
from mergekit_lite.engine.ray_machine import File, Needs, RayWorker, identity
from mergekit_lite.engine.ray_node import Node
from mergekit_lite.engine.ray_round import Round, Worker
from mergekit_lite.errors import GOES_ON, CheckpointError, RunError, UsageError, counted, listing, one_line

AHEAD = 1  # tasks that a worker has been given besides the one it does
MOST_LOSSES = 3  # times that a task may be lost with its worker, and workers that a node may lose in a row
PATIENCE = 300  # seconds without any worker after which nobody waits longer
LOOK_AROUND = 5.0  # seconds after which it is looked whether nodes have joined
NEWS, NEWS_EVERY = "news", 2.0  # of tasks that take long: what asks for them, and how often, in seconds
GPU, GPU_THREADS = "GPU", 6  # threads that keep a GPU's copies going

Task = TypeVar("Task")
Result = TypeVar("Result")


class Cluster:
    """The workers of a Ray cluster, from the first tasks to the end of the run.

    ``connect`` is called before the first tasks. ``local`` says that this process starts the cluster, on this machine
    alone; ``gpus`` that the workers have one each, and ``threads`` threads. ``most`` is the largest number of workers,
    or None for one on each processor or GPU.
    """

    def __init__(
        self,
        connect: Callable[[], None],
        *,
        local: bool = False,
        gpus: bool = False,
        most: int | None = None,
        threads: int = GPU_THREADS,
    ) -> None:
        self._connect: Callable[[], None] | None = connect
        self.local = local
        self.gpus = gpus
        self.most = most
        self.threads = threads if gpus else 1
        self.nodes: dict[str, Node] = {}
        self.on_news: Callable[[int], None] | None = None
        self._needs = Needs(identity())
        self._workers: list[Worker] = []
        self._rounds = 0
        self._looked = -LOOK_AROUND

    def must_see(self, files: Sequence[File], marks: Sequence[tuple[str, str]] = ()) -> None:
        """Have every machine look for files before it gets further tasks: inputs, and marks in working folders."""
        self._needs = Needs(self._needs.identity, tuple(files), tuple(marks))
        for worker in self._workers:
            worker.is_fit = False
        for node in self.nodes.values():
            node.refused = ""

    def connect(self) -> None:
        """Join or start the cluster, unless that was done. Raises UsageError, RunError."""
        if self._connect is not None:
            self._connect()
            self._connect = None
            if self.gpus and not any(count for _, count in self.places()):
                raise UsageError("No machine of the Ray cluster has a GPU. --device cpu needs none.")

    def run(
        self,
        tasks: Sequence[Task],
        worker: Callable[[], Callable[[Task], Result]],
        size: Callable[[Task], int] | None = None,
    ) -> Iterator[Result]:
        """Yield what ``worker()`` makes of each task, as they get done; large tasks begin first.

        ``worker`` is pickled, with what it refers to, and called by each worker. ``size`` returns the bytes that a task
        reads.

        Raises:
            UsageError: there is no such cluster, or no GPU in it.
            RunError: Ray can't be started, no machine can do the tasks, or too many workers were lost.
            Exception: what the first failing task raised. The other workers are stopped.
        """
        if not tasks:
            return iter(())
        import ray
        from ray import cloudpickle

        self.connect()
        sizes = [size(task) if size is not None else 0 for task in tasks]
        order = sorted(range(len(tasks)), key=lambda number: -sizes[number])
        self._rounds += 1
        dumps: Any = cloudpickle.dumps  # has no types
        job = ray.put(zlib.compress(dumps(worker), level=1))
        a_round = Round(self._rounds, job, [packed(task) for task in tasks], sizes, deque(order))
        return self._done(a_round)

    def _done(self, a_round: Round) -> Iterator[Any]:
        left = len(a_round.tasks)
        self._looked = -LOOK_AROUND
        last_ready = time.monotonic()
        try:
            for worker in self._workers:
                worker.done = worker.told = 0
                self._take_up(a_round, worker)
            while left:
                self._staff(a_round)
                self._hand_out(a_round)
                for reference in _ready(list(a_round.under_way)):
                    if reference not in a_round.under_way:
                        continue  # of a node that was refused meanwhile
                    worker, task = a_round.under_way.pop(reference)
                    answer = self._answer(a_round, reference, worker, task)
                    if answer is not None and task is not None and a_round.is_news(reference, task):
                        left -= 1
                        self._note(worker, a_round.sizes[task])
                        yield self._result(worker, answer)
                self._hear(a_round)
                if a_round.ready:
                    last_ready = time.monotonic()
                elif time.monotonic() - last_ready > PATIENCE:
                    why = f"no worker could be started within {PATIENCE} seconds: others may use the processors"
                    raise RunError(self._nobody(why))
        finally:
            self.on_news = None
            if left:
                self._dismiss()
            else:  # what is still under way was done by another
                for worker in {worker for worker, task in a_round.under_way.values() if task is not None}:
                    self._drop(a_round, worker)
                for worker in {a_round.under_way[each][0] for each in a_round.late & a_round.under_way.keys()}:
                    self.nodes[worker.node].lost += 1

    def _take_up(self, a_round: Round, worker: Worker) -> None:
        """Have a worker take part in a round, once it has looked around."""
        if worker.is_fit:
            a_round.ready.append(worker)
        else:
            a_round.under_way[self.looking(worker.actor)] = worker, None

    def looking(self, actor: Any) -> Any:
        """Have a worker look around; return the reference of what its machine lacks, an empty text for nothing."""
        return actor.look.remote(pickle.dumps(self._needs))

    def _result(self, worker: Worker, answer: bytes) -> Any:
        """Return a result from a worker's answer. Raises what the task raised there."""
        result, failure = pickle.loads(answer)
        if type(failure) in (RunError, CheckpointError) and not self.local:
            raise type(failure)(f"On {self.nodes[worker.node].name}: {failure}")
        if failure is not None:
            raise failure
        return result

    def _staff(self, a_round: Round) -> None:
        """Start workers where the cluster has room for them: at the beginning, for lost ones, on nodes that joined."""
        if time.monotonic() - self._looked < LOOK_AROUND:
            return
        self._looked = time.monotonic()
        places = self.places()
        at_work = Counter(worker.node for worker in self._workers)
        wanted = min(len(a_round.tasks), self.most or sum(count for _, count in places))
        while len(self._workers) < wanted:
            free = [(at_work[node] / count, node) for node, count in places if at_work[node] < count]
            if not free:
                break
            node = min(free)[1]  # the least busy one, so that a few workers are spread
            worker = Worker(node, self.started(node))
            at_work[node] += 1
            self._workers.append(worker)
            self._take_up(a_round, worker)
        for identifier, known in self.nodes.items():
            known.workers = at_work[identifier]
        if not self._workers:
            raise RunError(self._nobody("no machine of the cluster is alive"))

    def places(self, memory: int = 0) -> list[tuple[str, int]]:
        """Return the nodes that may be given tasks, each with the number of workers that fit there.

        Each takes so much ``memory``, in bytes, of what Ray counts as that of the machine.
        """
        import ray

        head_of(ray).wait()
        places = []
        nodes: Any = ray.nodes  # has no types
        for node in nodes():
            identifier = node["NodeID"]
            known = self.nodes.setdefault(identifier, Node(f"{node['NodeManagerHostname']} ({identifier[:8]})"))
            if node["Alive"] and not known.refused:
                has = node["Resources"]
                count = int(has.get(GPU if self.gpus else "CPU", 0))
                places.append((identifier, min(count, int(has.get("memory", 0) // memory)) if memory else count))
        return places

    def started(self, node: str, role: type[RayWorker] = RayWorker, *arguments: object) -> Any:
        """Start a worker on a node, of a class that takes these arguments, and return the handle of its actor."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1, "max_concurrency": self.threads} if self.gpus else {}
        options = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0} | options
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        remote: Any = ray.remote  # its types don't know of groups
        return remote(concurrency_groups={NEWS: 1})(role).options(**options).remote(*arguments)

    def _hand_out(self, a_round: Round) -> None:
        """Give tasks to the workers, to each as many as it may have."""
        has = Counter(worker for worker, task in a_round.under_way.values() if task is not None)
        most = self.threads + AHEAD
        for more in range(1, most + 1):  # to each one before anybody gets a second
            for worker in a_round.ready:
                if has[worker] < more and (task := a_round.next()) is not None:
                    has[worker] += 1
                    self._give(a_round, worker, task)
        for worker in [worker for worker in a_round.ready if not has[worker]]:
            if (task := a_round.next_late()) is not None:
                self._give(a_round, worker, task)

    def _give(self, a_round: Round, worker: Worker, task: int) -> None:
        node = self.nodes[worker.node]
        node.started = node.started or time.monotonic()
        reference = worker.actor.do.remote(a_round.number, a_round.job, a_round.tasks[task])
        a_round.under_way[reference] = worker, task
        a_round.given[reference] = time.monotonic()

    def _hear(self, a_round: Round) -> None:
        """Ask workers now and then how far they are, and pass on what they said."""
        import ray

        if self.on_news is None or time.monotonic() - a_round.asked_at < NEWS_EVERY:
            return
        a_round.asked_at = time.monotonic()
        asked = list(a_round.asked)
        for reference in ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else ():
            worker = a_round.asked.pop(reference)
            with suppress(ray.exceptions.RayError):  # whoever waits for its task is told
                worker.told = ray.get(reference)
        for worker in {*a_round.ready} - {*a_round.asked.values()}:
            a_round.asked[worker.actor.news.options(concurrency_group=NEWS).remote()] = worker
        for identifier, node in self.nodes.items():
            node.ahead = sum(worker.ahead for worker in self._workers if worker.node == identifier)
            if node.ahead:
                node.seconds = time.monotonic() - node.started
        self.on_news(sum(worker.ahead for worker in self._workers))

    def _answer(self, a_round: Round, reference: Any, worker: Worker, task: int | None) -> bytes | None:
        """Return what a worker answered; None where it had only to look around, or was lost."""
        import ray

        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            if worker in self._workers:
                self._lose(a_round, worker, error)
            if task is not None:
                self._give_back(a_round, worker, task)
            return None
        if task is not None:
            assert isinstance(answer, bytes)
            return answer
        if answer:
            self._refuse(a_round, worker.node, answer)
        elif worker in self._workers:
            worker.is_fit = True
            a_round.ready.append(worker)
        return None

    def _lose(self, a_round: Round, worker: Worker, error: Exception) -> None:
        """Forget a worker that died or can't be reached."""
        self._drop(a_round, worker)
        self._looked = -LOOK_AROUND
        node = self.nodes[worker.node]
        node.losses += 1
        node.lost += 1
        if node.losses > MOST_LOSSES:
            self._refuse(a_round, worker.node, f"lost {counted(node.losses, 'worker')} in a row: {_why(error)}")

    def _give_back(self, a_round: Round, worker: Worker, task: int) -> None:
        """Let a task of a lost worker be done by another. Raises RunError where it was lost too often."""
        if task in a_round.done:
            return
        a_round.waiting.appendleft(task)
        a_round.losses[task] += 1
        if a_round.losses[task] > MOST_LOSSES:
            raise RunError(
                f"Ray: the same work was lost {a_round.losses[task]} times with its worker, the last time on "
                f"{self.nodes[worker.node].name}. Usually that means that the memory there ran out: a cluster that "
                f"offers fewer CPUs of each machine (ray start --num-cpus) needs less. {GOES_ON}"
            )

    def _refuse(self, a_round: Round, node: str, why: str) -> None:
        """Give a node no more tasks. Raises RunError where none is left."""
        self.nodes[node].refused = why
        self._looked = -LOOK_AROUND  # others may take its place
        for worker in [worker for worker in self._workers if worker.node == node]:
            self._drop(a_round, worker)
            for reference in [one for one, (of, _) in a_round.under_way.items() if of == worker]:
                _, task = a_round.under_way.pop(reference)
                if task is not None:
                    a_round.waiting.appendleft(task)
        if not any(count for _, count in self.places()):
            raise RunError(self._nobody("no machine of the cluster can do this work"))

    def _nobody(self, why: str) -> str:
        """Return the message that no machine works."""
        refused = [f"{node.name}: {node.refused}" for node in self.nodes.values() if node.refused]
        title = f"Ray: {why}"
        return (listing(title, refused) if refused else f"{title}.") + f"\n{GOES_ON}"

    def _note(self, worker: Worker, nbytes: int) -> None:
        node = self.nodes[worker.node]
        worker.done += nbytes
        node.losses = 0
        node.tasks += 1
        node.nbytes += nbytes
        node.seconds = time.monotonic() - node.started

    def _drop(self, a_round: Round, worker: Worker) -> None:
        """End a worker."""
        import ray

        with suppress(ValueError):
            self._workers.remove(worker)
        with suppress(ValueError):
            a_round.ready.remove(worker)
        if head_of(ray).answers():
            with suppress(Exception):
                ray.kill(worker.actor)

    def _dismiss(self) -> None:
        """End all workers; the next tasks start others."""
        import ray

        for worker in self._workers if head_of(ray).answers() else ():
            with suppress(Exception):
                ray.kill(worker.actor)
        self._workers.clear()
        self._looked = -LOOK_AROUND


def _ready(references: list[Any]) -> list[Any]:
    """Wait for an answer, a second at most, and return the references of all that are there."""
    import ray

    if not references:  # the last workers were lost just now
        time.sleep(0.1)
        return []
    one, _ = ray.wait(references, timeout=1.0)
    return ray.wait(references, num_returns=len(references), timeout=0)[0] if one else []


def _why(error: Exception) -> str:
    """Return what Ray says about a worker that died, in a line."""
    text = str(error)
    if "No module named 'mergekit_lite'" in text:
        return f"mergekit_lite is not installed there. Install version {__version__} with the extra ray"
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__)
