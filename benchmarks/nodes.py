"""The prediction of ``plan --nodes`` beside runs on a Ray cluster, whose nodes have one core of this machine each.

    python -m benchmarks.nodes [--size 5e8] [--runs 3] [--nodes 2] [--only extrapolate,ties] [--quick]

This machine's disk is the file system that they share. What it gives to as many processes at once is measured before
each run, read from the disk and written as the nodes write, and told to ``plan`` as ``--disk``. Starting Ray is not
predicted, so what is compared is the time from the first task to the last result.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.bench import DISTURBED, Bench, named, say
from benchmarks.checkpoints import SFT_RMS, Family
from benchmarks.machine import this_machine
from benchmarks.prediction import AIM, CASES, Case
from benchmarks.processes import busy_seconds
from benchmarks.tables import Table, publish, size, spread
from mergekit_lite.output.file_writer import FileWriter, WriteTimes

QUICK_SIZE, QUICK_RUNS = 5e7, 1
PIECE = 1 << 21
MOVED = 1 << 28  # bytes that each process reads, and writes, to see what the disk gives
SKEW = 1_000  # bytes: tensors begin in the middle of pages, whose ends are written for themselves
STORE = 80 << 20  # bytes of each node's object store


@dataclass(frozen=True)
class Pair:
    """A prediction, and the seconds from the first task to the last result of the run it was made of.

    ``rates`` are the bytes a second that the disk gave each node, and took from it; ``others`` as in ``Run``.
    """

    predicted: float
    real: float
    limit: str
    rates: tuple[float, float]
    others: float


@click.command()
@click.option("--size", "parameters", type=click.FloatRange(4e7), default=5e8, show_default=True, help="Parameters.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are told.")
@click.option("--nodes", "counts", default="2", show_default=True, help="Numbers of nodes, from 2 on.")
@click.option("--only", default="extrapolate,ties,breadcrumbs", show_default=True, help="Labels of ``prediction``'s.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), default=Path(__file__).parent / "out")
@click.option("--keep", is_flag=True, help="Leave the checkpoints for the next time.")
@click.option("--quick", is_flag=True, help="A smoke test: 50 M parameters, one run, no verdicts.")
def main(parameters: float, runs: int, counts: str, only: str, folder: Path, keep: bool, quick: bool) -> None:
    """Predict and run merges side by side."""
    if quick:
        parameters, runs = QUICK_SIZE, QUICK_RUNS
    bench, machine = Bench(folder), this_machine()
    family = Family(folder / named("prediction", parameters), ("base", "math", "code"), SFT_RMS, parameters)
    bench.demand_room(family)
    bench.prepare(family)
    cases = [case for case in CASES if case.label in only.split(",")]
    pairs: dict[tuple[str, int], list[Pair]] = {}
    try:
        for count in map(int, counts.split(",")):
            say(f"A cluster of {count}")
            with _cluster(count) as address:
                for case in cases * runs:
                    pair = _pair(bench, case, family, count, address)
                    pairs.setdefault((case.label, count), []).append(pair)
                    say(f"  {case.label}: predicted {pair.predicted:.2f} s ({pair.limit}), real {pair.real:.2f} s")
    finally:
        bench.clear()
        if not keep:
            family.remove()
    others = [pair.others for of in pairs.values() for pair in of]
    notes = [f"Meanwhile all else than the run kept {spread(others)} of {machine.cores} cores busy."]
    if median(others) > DISTURBED * machine.cores:
        notes[0] += " The times are too long: measure again when it is idle."
    if not quick:
        errors = [_error(of) for of in pairs.values()]
        notes.insert(0, f"Within {AIM:.0%}: {sum(abs(error) <= AIM for error in errors)} of {len(errors)} times.")
    heading = (
        f"Predicted and real seconds of work on nodes of one core, medians of {runs} with the least and the most; "
        f"models of {family.parameters / 1e9:.2g} B parameters ({size(family.nbytes)}), not in the page cache. "
        f"{machine}."
    )
    data: dict[str, Any] = {"machine": machine.as_data()}
    data["pairs"] = {f"{label}|{count}": [asdict(pair) for pair in of] for (label, count), of in pairs.items()}
    publish(folder, "nodes", heading, [_table(pairs)], notes, data)


@contextmanager
def _cluster(count: int) -> Iterator[str]:
    """Give the address of a Ray cluster of so many nodes here, with a processor each."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE}
    cluster: Any = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(**options)
        yield cluster.address
    finally:
        cluster.shutdown()


def _pair(bench: Bench, case: Case, family: Family, nodes: int, address: str) -> Pair:
    """Predict a run by what the disk gives now, and make it."""
    bench.clear()
    bench.output.mkdir(parents=True)
    recipe = bench.folder / "nodes-recipe.yml"
    recipe.write_text(json.dumps(case.recipe(family.models)))
    bench.settle()
    rates = _rates(family, bench.output, nodes)
    disk = ",".join(f"{rate / 1e9:.3f}" for rate in rates)
    asked = [bench.program, "plan", str(recipe), "--nodes", str(nodes), "--cores", "1", "--threads", "1"]
    asked += ["--disk", disk, "--json"]
    told = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)["prediction"]
    _forget(family)
    bench.settle()
    command = [bench.program, "merge", str(recipe), "-o", str(bench.output / "model"), "--ray", address, "--json"]
    busy, started = busy_seconds() or 0.0, time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True)
    wall, busy = time.perf_counter() - started, (busy_seconds() or 0.0) - busy
    if ended.returncode:
        raise click.ClickException(ended.stderr[-2000:])
    done = [node for node in json.loads(ended.stdout)["nodes"] if node["tasks"]]
    predicted = told["seconds"]["statistics"] + told["seconds"]["merging"]
    others = max(0.0, busy - told["processor_seconds"]) / wall
    return Pair(predicted, max(node["seconds"] for node in done), told["limit"], rates, others)


def _rates(family: Family, folder: Path, processes: int) -> tuple[float, float]:
    """Return the bytes a second that the disk gives to each of some processes at once, and takes from it."""
    _forget(family)
    files = [path for model in family.models for path in sorted(model.glob("*.safetensors"))]
    read = _at_once(processes, lambda number: _read(files[number % len(files)], number // len(files) * MOVED))
    _forget(family)
    os.sync()
    written = _at_once(processes, lambda number: _write(folder / f"written-{number}"))
    return read, written


def _at_once(processes: int, move: Callable[[int], None]) -> float:
    """Return the bytes a second of each of some processes that move bytes at once."""
    started = time.perf_counter()
    context = multiprocessing.get_context("fork")
    team = [context.Process(target=move, args=(number,)) for number in range(processes)]
    for process in team:
        process.start()
    for process in team:
        process.join()
    return MOVED / (time.perf_counter() - started)


def _read(path: Path, begin: int) -> None:
    buffer = bytearray(PIECE)
    descriptor = os.open(path, os.O_RDONLY)
    for place in range(begin, begin + MOVED, PIECE):
        os.preadv(descriptor, [buffer], place)


def _write(path: Path) -> None:
    piece = memoryview(mmap.mmap(-1, PIECE))
    file = FileWriter(path, MOVED + SKEW, WriteTimes(), shared=True)
    for place in range(SKEW, MOVED, PIECE):
        file.write(place, piece)
    file.close()
    path.unlink()


def _forget(family: Family) -> None:
    """Drop a family from the page cache."""
    for path in family.folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _error(pairs: Sequence[Pair]) -> float:
    return median(pair.predicted / pair.real for pair in pairs) - 1


def _table(pairs: Mapping[tuple[str, int], Sequence[Pair]]) -> Table:
    rows = []
    for (label, count), of in pairs.items():
        rates = [f"{median(pair.rates[way] for pair in of) / 1e9:.2f}" for way in (0, 1)]
        predicted = f"{median(pair.predicted for pair in of):.2f}"
        rows.append((label, str(count), *rates, predicted, spread([pair.real for pair in of]), f"{_error(of):+.0%}"))
    columns = ("method", "nodes", "read by each, GB/s", "written", "predicted, s", "real, s", "error")
    return Table("Predicted and real seconds of work on nodes", columns, rows)


if __name__ == "__main__":
    main()
