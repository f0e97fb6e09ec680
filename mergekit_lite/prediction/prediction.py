"""The prediction: a plan's work, cut into tasks as the engine cuts it, and given to workers and nodes.

A node's workers overlap reading, computing and writing, so the slowest of these decides:

    seconds = start + Σ over phases of max(processor time / cores, bytes / rate of the disk or the network,
                                           what a worker does one thing after another / workers)

There are two phases, as statistics that span tensors, or one of more than 64 Mi elements, come first. No phase is
shorter than its largest task, or than the command takes to hand out tasks and note their results. With several nodes a
task goes to the node that is free first, the largest first; the busiest node decides.

Several nodes make an output of several files in an object store file by file: there a task of the second phase is a
file, and its worker overlaps reading, computing and sending by itself. The busiest worker decides then.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lite import block_fp8
from mergekit_lite.engine.memory import memory_estimate
from mergekit_lite.engine.tensor_merge import LARGE
from mergekit_lite.engine.tiling import SPAN, joined_elements
from mergekit_lite.methods.tensor_merge import SECTION
from mergekit_lite.planning import Plan
from mergekit_lite.prediction.cluster import OVER_NET, Cached, Cluster, cached
from mergekit_lite.prediction.costs import Cost, Costs, measured_costs
from mergekit_lite.prediction.steps import AFTER, BEFORE, BY_RAY, BY_WORKER, ENDING, MEANWHILE, RECEIVED, SENT, Steps

IDLE = 1.25  # times as long as a node's busiest part has work: then workers without a file make the difference
FITS = 0.8  # of the free memory: models that are not larger stay in the page cache once they were read


class Load(NamedTuple):
    """Work of a task or of many: seconds of processor time, and bytes.

    ``fetched`` and ``stored`` pass the disk, ``received`` and ``sent`` the network; what comes from the page cache
    passes neither.
    """

    processor: float = 0.0
    fetched: float = 0.0
    stored: float = 0.0
    received: float = 0.0
    sent: float = 0.0

    def plus(self, other: Load, times: float = 1) -> Load:
        """Return the sum of this load and another, that one some times."""
        return Load(*(mine + times * its for mine, its in zip(self, other, strict=True)))

    def times(self, factor: float) -> Load:
        """Return a part of it, or some of it."""
        return Load().plus(self, factor)


@dataclass(frozen=True)
class Prediction:
    """What a run of a plan will take.

    Attributes:
        cluster: the machines.
        workers: of each node.
        seconds: from start to end: ``start`` (Python, planning, imports), ``statistics`` that come first, ``merging``
            (with what else is gathered), ``finish``.
        processor: seconds of processor time, all nodes together.
        compute, disk, net: seconds for which the busiest node's cores, disk and connection have work.
        read: bytes of weights; ``read_again`` those that are read once more for statistics.
        from_disk, written: bytes that the disks give, and bytes of output.
        received, sent: bytes that cross the network to the nodes, and from them.
        share: of the work that the busiest node does.
        memory: bytes, each node.
        by_file: whether a worker makes a whole file, of an output in an object store.
    """

    cluster: Cluster
    workers: int
    start: float
    statistics: float
    merging: float
    finish: float
    processor: float
    compute: float
    disk: float
    net: float
    read: int
    read_again: int
    from_disk: int
    written: int
    received: int
    sent: int
    share: float
    memory: int
    by_file: bool

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.start + self.statistics + self.merging + self.finish

    @property
    def limit(self) -> str:
        """What takes longest: ``compute``, ``disk``, ``net``, or ``start-up`` of which all else is the smaller part.

        ``files`` where there are too few of them to keep the workers of a node busy.
        """
        busy = {"compute": self.compute, "disk": self.disk, "net": self.net}
        most = max(busy, key=lambda name: busy[name])
        if self.by_file and self.statistics + self.merging > max(IDLE * busy[most], self.start + self.finish):
            return "files"
        return most if busy[most] > self.start + self.finish else "start-up"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data: seconds and bytes, a rate of null where it is without limit."""
        cluster = self.cluster
        return {
            "nodes": cluster.nodes,
            "cores": cluster.cores,
            "workers": self.workers,
            "rates": {
                "measured": cluster.is_measured,
                "read": _finite(cluster.read),
                "write": _finite(cluster.write),
                "net": cluster.net,
            },
            "seconds": {
                "total": round(self.seconds, 3),
                "start": round(self.start, 3),
                "statistics": round(self.statistics, 3),
                "merging": round(self.merging, 3),
                "finish": round(self.finish, 3),
            },
            "busy": {"compute": round(self.compute, 3), "disk": round(self.disk, 3), "net": round(self.net, 3)},
            "limit": self.limit,
            "processor_seconds": round(self.processor, 3),
            "bytes": {
                "read": self.read,
                "read_again": self.read_again,
                "from_disk": self.from_disk,
                "written": self.written,
                "received": self.received,
                "sent": self.sent,
            },
            "busiest_node": round(self.share, 4),
            "memory": self.memory,
        }


def predict(
    plan: Plan,
    cluster: Cluster,
    workers: int | None = None,
    started: float | None = None,
    costs: Costs | None = None,
    before: Collection[Path] = (),
) -> Prediction:
    """Predict what a run of a plan on CPUs will take; headers are all that is looked at.

    Args:
        plan: from any of the planning functions.
        cluster: the machines: ``this_cluster``, or given.
        workers: of each node; by default one more than cores on a single one, else one for each core.
        started: seconds that start-up and planning took; by default the processor time of this process.
        costs: of the plan's jobs, where they were measured before.
        before: input files that were read just before, and are in the page cache therefore.
    """
    started = time.process_time() if started is None else started
    workers = workers or (cluster.cores + 1 if cluster.nodes == 1 else cluster.cores)
    costs = costs or measured_costs(plan)
    cluster = cluster.met_by(workers, plan.bytes_to_write // cluster.nodes)
    tensors = len(plan.jobs)
    apart = workers > 1 or cluster.nodes > 1  # processes of their own
    work = _Work(plan, cluster, before, costs.step, BY_WORKER.plus(SENT) if apart else BY_WORKER)
    for (kind, job), count in _alike(plan, costs.kinds, by_file=work.by_file).items():
        work.add(costs.of_kind[kind], job, count)
    pace = _Pace(cluster, workers)
    statistics = pace.phase(work.early)
    command = MEANWHILE.plus(RECEIVED) if apart else MEANWHILE
    meanwhile = costs.step * (command.tensor * tensors + command.task * work.tasks)
    merging = pace.phase(work.late, meanwhile, by_file=work.by_file)
    load = work.load
    busiest = max(statistics.share, merging.share) if work.early else merging.share
    disk, net = pace.disk(load.times(busiest)), pace.net(load.times(busiest))
    start = started + costs.importing + costs.step * BEFORE.tensor * tensors
    finish = costs.step * (ENDING + AFTER.tensor * tensors)
    return Prediction(
        cluster,
        workers,
        start=start,
        statistics=statistics.seconds,
        merging=merging.seconds,
        finish=finish,
        processor=start + load.processor + meanwhile + finish,
        compute=load.processor * busiest / pace.parallel,
        disk=disk,
        net=net,
        read=plan.bytes_to_read,
        read_again=round(work.read_again),
        from_disk=round(load.fetched),
        written=plan.bytes_to_write,
        received=round(load.received),
        sent=round(load.sent),
        share=busiest,
        memory=memory_estimate(plan, workers),
        by_file=work.by_file,
    )


class _Alike(NamedTuple):
    """What the work of a job depends on besides its kind."""

    numel: int
    read: int
    written: int
    codes: bool
    file: int = 0  # in which it is written, where that makes a difference


def _alike(plan: Plan, kinds: list[Any], *, by_file: bool) -> Mapping[tuple[Any, _Alike], int]:
    """Return how many jobs there are of each kind and size, in each file if that makes a difference."""
    scales = {job.scales_of: job.nbytes for job in plan.jobs if job.scales_of}
    found: Counter[tuple[Any, _Alike]] = Counter()
    for job, kind in zip(plan.jobs, kinds, strict=True):
        if kind is not None:
            read = sum([spec.nbytes for spec in job.inputs])
            written = (job.nbytes + scales.get(job.name, 0)) * len(plan.outputs)
            file = plan.layout.place(job.name)[0] if by_file else 0
            found[kind, _Alike(job.numel, read, written, job.dtype == block_fp8.CODES, file)] += 1
    return found


class _Work:
    """The tasks of a plan, in two phases.

    Attributes:
        early: tasks with how many there are of each: sections of statistics that come first.
        tasks: how many of them are handed out.
        read_again: bytes that are read once more for statistics.
        by_file: whether a worker makes a whole file.
    """

    def __init__(self, plan: Plan, cluster: Cluster, before: Collection[Path], step: float, by_worker: Steps) -> None:
        self.cluster = cluster
        self._per_tensor, self._per_task = step * by_worker.tensor, step * by_worker.task  # seconds of a worker
        self._per_task += BY_RAY if cluster.nodes > 1 else 0.0
        self._joined = joined_elements(sum([job.numel for job in plan.jobs]))
        self.tasks = 0.0
        self.early: list[tuple[Load, int]] = []
        self._spans: list[tuple[Load, int]] = []
        self._files: dict[int, Load] = {}
        in_store = cluster.net is not None and not cluster.is_shared
        self.by_file = in_store and cluster.nodes > 1 and len(plan.layout.files) > 1
        self.read_again = 0.0
        there, self.stays = Cached(0.0, None), False
        if cluster.is_measured:
            files = ((file.path, file.size) for source in plan.inputs for file in source.files_read)
            # What isn't there yet another plan will have written, through the page cache where that is the quicker way.
            there = cached(files, lambda path: path in before or (cluster.buffered > 0 and not path.exists()))
            self.stays = plan.bytes_to_read <= FITS * cluster.free_memory
        self.uncached = 1 - there.share
        self.copy_in = cluster.copy_in if there.copying is None else there.copying * cluster.crowding
        self.fetch = cluster.copy_in if in_store else cluster.fetch

    @property
    def late(self) -> list[tuple[Load, int]]:
        """All tasks but the early ones, with how many there are of each: files or spans."""
        return [*self._spans, *((load, 1) for load in self._files.values())]

    @property
    def load(self) -> Load:
        """All of it."""
        total = Load()
        for load, count in self.early + self.late:
            total = total.plus(load, count)
        return total

    def add(self, cost: Cost, job: _Alike, count: int) -> None:
        """Add ``count`` jobs that are alike."""
        point = cost.of(job.numel)
        again = point.read_again if cost.has_statistics else 0.0
        self.read_again += again * count
        apart = cost.has_statistics and (cost.group or job.numel > LARGE)
        first_read = job.read * self.uncached
        if apart:
            fetched = min(again, first_read) if self.stays else again * self.uncached
            gathering = Load(point.statistics + self._copying(again, fetched), fetched)
            sections = -(-job.numel // SECTION)
            self._add(self.early, self._sent(gathering, again), sections, job, count)
            first_read = first_read - fetched if self.stays else first_read
        seconds = point.merging + (0.0 if apart else point.statistics) + self._per_tensor
        again = 0.0 if apart else again
        seconds += (
            self._copying(job.read, first_read) + again * self.cluster.copy_again + job.written * self.cluster.copy_out
        )
        load = self._sent(Load(seconds, first_read, job.written), job.read + again)
        if self.by_file:
            self._files[job.file] = self._files.get(job.file, Load()).plus(load, count)
            return
        spans = 1 if job.codes or (cost.has_statistics and not apart) else max(1, -(-job.numel // SPAN))
        self._add(self._spans, load, spans, job, count)

    def _add(self, phase: list[tuple[Load, int]], load: Load, parts: int, job: _Alike, count: int) -> None:
        """Add the tasks of jobs that are alike to a phase; those of small jobs are joined."""
        tasks = parts * min(1.0, job.numel / max(1, self._joined))
        self.tasks += tasks * count
        load = load.plus(Load(self._per_task), tasks)
        phase.append((load.times(1 / parts), parts * count))

    def _copying(self, nbytes: float, fetched: float) -> float:
        """Return the seconds of processor time to read some bytes, of which those fetched are not in the page cache."""
        return fetched * self.fetch + (nbytes - fetched) * self.copy_in

    def _sent(self, load: Load, copied: float) -> Load:
        """Return a load with what of it crosses the network, if anything; ``copied`` are all bytes that are read."""
        if self.cluster.net is None:
            return load
        if self.cluster.is_shared:
            return load._replace(received=load.fetched, sent=load.stored)
        seconds = load.processor + OVER_NET * (copied + load.stored)
        return Load(seconds, 0.0, 0.0, copied, load.stored)


class _Phase(NamedTuple):
    seconds: float
    share: float  # of the work, that the busiest node does


class _Pace:
    """How long loads take on the nodes of a cluster."""

    def __init__(self, cluster: Cluster, workers: int) -> None:
        self.cluster = cluster
        self.workers = workers
        self.parallel = min(workers, cluster.cores)

    def disk(self, load: Load) -> float:
        """Return the seconds for which one node's disk has work: it reads and writes at the same time."""
        beyond = max(0.0, load.stored - self.cluster.buffered)
        return max(load.fetched / self.cluster.read, beyond / self.cluster.write)

    def net(self, load: Load) -> float:
        """Return the seconds for which one node's connection has work, both ways at the same time."""
        return max(load.received, load.sent) / (self.cluster.net or math.inf)

    def alone(self, load: Load) -> float:
        """Return the seconds that one worker alone takes, doing one thing after another."""
        cluster = self.cluster
        reading = max(0.0, 1 / cluster.read - cluster.fetch)  # a rate is what one sees who moves bytes, work included
        writing = cluster.write_wait if cluster.is_measured else max(0.0, 1 / cluster.write - cluster.copy_out)
        moved = (load.received + load.sent) / (cluster.net or math.inf)
        return load.processor + load.fetched * reading + load.stored * writing + moved

    def node(self, load: Load) -> float:
        """Return the seconds that the cores, the disk and the connection of one node take at least."""
        return max(load.processor / self.parallel, self.disk(load), self.net(load))

    def phase(self, tasks: list[tuple[Load, int]], least: float = 0.0, *, by_file: bool = False) -> _Phase:
        """Return the seconds that some tasks take, each with how often it comes; ``least`` the command's own."""
        total = Load()
        for load, count in tasks:
            total = total.plus(load, count)
        if by_file:
            times = [(max(load.processor, self.net(load)), count) for load, count in tasks]
            share = busiest_share(times, self.cluster.nodes)
            in_all = sum(seconds * count for seconds, count in times)
            worker = in_all * busiest_share(times, self.cluster.nodes * self.workers)
        else:
            times = [(self.alone(load), count) for load, count in tasks]
            share = busiest_share(times, self.cluster.nodes)
            largest = max((seconds for seconds, _ in times), default=0.0)
            worker = max(self.alone(total.times(share)) / self.workers, largest)
        return _Phase(max(self.node(total.times(share)), worker, least), share)


def busiest_share(tasks: Iterable[tuple[float, int]], nodes: int) -> float:
    """Return the share of the work that the busiest of some nodes does.

    ``tasks`` are seconds, and how many take so long. Each task goes to the node that is free first, the largest first:
    with more nodes none has more to do than the busiest had.
    """
    tasks = sorted(tasks, reverse=True)
    total = sum(seconds * count for seconds, count in tasks)
    if nodes == 1 or total <= 0:
        return 1.0 if nodes == 1 else 1 / nodes
    nodes = min(nodes, sum(count for _, count in tasks))  # others have nothing to do
    loads = [0.0] * nodes
    for seconds, count in tasks:
        rounds = (count // nodes) * (max(loads) == min(loads))  # whole rounds from a level ground stay level
        if rounds:
            loads = [load + seconds * rounds for load in loads]
        for _ in range(count - rounds * nodes):
            heapq.heapreplace(loads, loads[0] + seconds)
    return max(loads) / total


def _finite(rate: float) -> float | None:
    return None if math.isinf(rate) else round(rate)
