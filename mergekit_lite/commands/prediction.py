"""The prediction of a plan: the options that give the machines, and the table that shows it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.checkpoint.extents import is_elsewhere_file
from mergekit_lite.commands import values
from mergekit_lite.commands.units import rate_text, seconds, size
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.memory import most_held
from mergekit_lite.object_stores import Place

if TYPE_CHECKING:
    from mergekit_lite.planning import Plan
    from mergekit_lite.prediction import Cluster, InTurn, Prediction

OPTIONS = (
    click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines, all alike."),
    click.option("--cores", type=click.IntRange(min=1), help="Of each node; by default those of this machine."),
    click.option(
        "--threads", type=click.IntRange(min=1), help="Workers of each node; by default as a run would take them."
    ),
    click.option(
        "--disk",
        metavar="GB/s[,GB/s]",
        callback=values.rates,
        help="What each node reads from the disk under the models, and what it writes there (by default as much).",
    ),
    click.option(
        "--net",
        metavar="GB/s",
        callback=values.rate,
        help="Each node's network, each way, where models are elsewhere: in an object store, or with --disk in a "
        "shared file system.",
    ),
)


def takes_cluster(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the machines; the function gets them as ``cluster_options``, ``predicted``'s."""

    @functools.wraps(function)
    def with_group(**arguments: Any) -> None:
        chosen = {name: arguments.pop(name) for name in ("nodes", "cores", "threads", "disk", "net")}
        function(cluster_options=chosen, **arguments)

    for option in reversed(OPTIONS):
        with_group = option(with_group)
    return with_group


def predicted(plan: Plan, **options: Any) -> Prediction | None:
    """Predict a run; see ``predicted_in_turn``."""
    told = predicted_in_turn([plan], **options)
    return told.predictions[0] if told is not None else None


def predicted_in_turn(
    plans: Sequence[Plan],
    *,
    nodes: int = 1,
    cores: int | None = None,
    threads: int | None = None,
    disk: tuple[float, float] | None = None,
    net: float | None = None,
    devices: Sequence[str] = (CPU,),
) -> InTurn | None:
    """Predict runs, one after the other, on some machines: without rates on such as this one, which is measured.

    ``disk`` and ``net`` are in bytes a second. Returns None for GPUs, where weights lie elsewhere without ``net``, as
    what the network gives is not measured, and where ``not_predicted`` says why.
    """
    elsewhere = any(is_elsewhere_file(file.path) for plan in plans for source in plan.inputs for file in source.files)
    elsewhere |= any(isinstance(output, Place) for plan in plans for output in plan.outputs)
    if CPU not in devices or (elsewhere and net is None) or any(map(not_predicted, plans)):
        return None
    from mergekit_lite.prediction import predict_in_turn

    started = time.process_time()  # without what measuring takes
    return predict_in_turn(plans, _cluster(plans[-1], nodes, cores, threads, disk, net), threads, started)


def not_predicted(plan: Plan) -> str | None:
    """Return why it can't be told what a plan takes; None where its method is no reason.

    Costs are measured on small tensors and grow with the elements; those of decompositions grow faster.
    """
    if not most_held(plan):
        return None
    return "time is not predicted: decomposing whole matrices takes longer than in proportion to their size"


def _cluster(
    plan: Plan, nodes: int, cores: int | None, threads: int | None, disk: tuple[float, float] | None, net: float | None
) -> Cluster:
    from mergekit_lite.prediction import Cluster, this_cluster

    if disk is None and net is None:
        here = this_cluster(Path(str(plan.outputs[0])), threads)
        here = here if cores is None else replace(here, cores=cores)
        return here if nodes == 1 else replace(here, nodes=nodes, is_measured=False, buffered=0.0)
    given: dict[str, Any] = {} if disk is None else {"read": disk[0], "write": disk[1]}
    return Cluster(cores or _cores(), nodes, net=net, is_shared=disk is not None, **given)


def _cores() -> int:
    from mergekit_lite.engine.pool import available_cores

    return available_cores()


def headline(prediction: Prediction) -> str:
    """Return the prediction in a line: ``about 41 s on 4 nodes of 16 cores; the disk limits``."""
    cluster, limit = prediction.cluster, prediction.limit
    machines = "node" if cluster.nodes == 1 else "nodes"
    cores = f"{cluster.cores} core{'s' * (cluster.cores > 1)}"
    where = f"this machine, {cores}" if cluster.is_measured else f"{cluster.nodes} {machines} of {cores}"
    workers = f"{prediction.workers} worker{'s' * (prediction.workers > 1)}"
    each = " each" if cluster.nodes > 1 else ""
    what = {
        "compute": "computing",
        "disk": "the disk",
        "net": "the network",
        "files": "the number of files",
        "start-up": "start-up",
    }[limit]
    return f"about {seconds(prediction.seconds)} on {where}, {workers}{each}; {what} limits"


def rows(prediction: Prediction) -> list[tuple[str, str, str, str, str]]:
    """Return the lines of the table: what, in all, for the busiest node, its rate, and the time that takes."""
    cluster, share = prediction.cluster, prediction.share
    lines = [("start-up and planning", "", "", "", seconds(prediction.start))]
    busy = prediction.compute * min(prediction.workers, cluster.cores)
    work = prediction.processor - prediction.start - prediction.finish
    cores = min(prediction.workers, cluster.cores)
    lines.append(
        ("computing", seconds(work), seconds(busy), f"{cores} core{'s' * (cores > 1)}", seconds(prediction.compute))
    )

    def moved(what: str, nbytes: float, rate: float | None, buffered: float = 0.0) -> None:
        time = seconds(max(0.0, nbytes * share - buffered) / rate) if rate else ""
        lines.append((what, size(nbytes), size(nbytes * share), rate_text(rate), time))

    if cluster.net is None or cluster.is_shared:
        moved("read from disk", prediction.from_disk, cluster.read)
        moved("written", prediction.written, cluster.write, cluster.buffered)
    if cluster.net is not None:
        moved("received over the network", prediction.received, cluster.net)
        moved("sent", prediction.sent, cluster.net)
    lines.append(("index, card, renames", "", "", "", seconds(prediction.finish)))
    return lines
