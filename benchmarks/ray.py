"""Throughput of 1, 2 and 4 single-thread workers of a Ray cluster, beside as many workers of a plain run.

    python -m benchmarks.ray [--size 1.5e9] [--runs 3] [--workers 1,2,4] [--only linear,ties] [--quick]

Each round makes every run once, one after the other. From the start of a command to its end there is the start of Ray,
ten seconds of work that don't grow with the models; what workers do is measured from the first task to the last result.
Processor time is that of all processes that a command starts, looked at ten times a second, as Ray's don't end in time
to be counted by the system; its workers' share is told by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.bench import DISTURBED, Bench, named, say
from benchmarks.checkpoints import SFT_RMS, Family
from benchmarks.machine import this_machine
from benchmarks.processes import busy_seconds, seconds_of
from benchmarks.tables import Table, publish, size, spread

HALF = {"weight": 0.5, "density": 0.5}
METHODS: Mapping[str, tuple[Mapping[str, float], Mapping[str, str]]] = {  # parameters of each model, and of all
    "linear": ({"weight": 0.5}, {}),
    "ties": (HALF, {"trim": "global"}),
    "della": (HALF | {"epsilon": 0.1}, {}),
}
QUICK_SIZE, QUICK_RUNS = 5e7, 1
LOOK_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class Took:
    """What a command took.

    Attributes:
        wall: seconds from its start to its end.
        working: of that, from the first task to the last result; all but the command's own start in a plain run.
        processor: seconds of processor time of all its processes.
        workers: those of Ray's workers; of all in a plain run.
        nbytes: of the output.
        others: cores that everything else kept busy meanwhile.
    """

    wall: float
    working: float
    processor: float
    workers: float
    nbytes: int
    others: float

    @property
    def rate(self) -> float:
        """GB of output that the workers make in a second of their work."""
        return self.nbytes / self.working / 1e9


def run(command: Sequence[str], nbytes: int) -> Took:
    """Run a command that makes so many bytes and prints JSON. Raises ClickException where it fails."""
    seen: dict[int, tuple[float, bool]] = {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        busy, started = busy_seconds() or 0.0, time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=told)
        while process.poll() is None:
            _look(process.pid, seen)
            time.sleep(LOOK_EVERY)
        wall = time.perf_counter() - started
        busy = (busy_seconds() or 0.0) - busy
        out.seek(0)
        told.seek(0)
        if process.returncode:
            raise click.ClickException(f"{' '.join(command)}\n{told.read()[-2000:]}")
        result = json.loads(out.read())
    processor = sum(seconds for seconds, _ in seen.values())
    others = max(0.0, (busy - processor) / wall)
    if "nodes" not in result:
        return Took(wall, result["seconds"], processor, processor, nbytes, others)
    nodes = [node for node in result["nodes"] if node["tasks"]]
    working = max(node["seconds"] for node in nodes)
    workers = sum(seconds for seconds, is_worker in seen.values() if is_worker)
    return Took(wall, working, processor, workers, nbytes, others)


def _look(pid: int, seen: dict[int, tuple[float, bool]]) -> None:
    """Note the processor time of a process and of all that it started, and which of them are Ray's workers."""
    with suppress(OSError, ValueError):
        folder = Path(f"/proc/{pid}")
        is_worker = (folder / "cmdline").read_bytes().startswith(b"ray::RayWorker")
        seen[pid] = seconds_of(pid), is_worker or seen.get(pid, (0.0, False))[1]
        for task in (folder / "task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                _look(child, seen)


@click.command()
@click.option("--size", "parameters", type=click.FloatRange(4e7), default=1.5e9, show_default=True, help="Parameters.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Of each command.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), default=Path(__file__).parent / "out")
@click.option("--keep", is_flag=True, help="Leave the checkpoints for the next time.")
@click.option("--quick", is_flag=True, help="A smoke test: 50 M parameters, one run.")
@click.option("--workers", "counts", default="1,2,4", show_default=True, help="Numbers of workers.")
@click.option("--only", default="linear,ties", show_default=True, help=f"Of {', '.join(METHODS)}.")
def main(parameters: float, runs: int, folder: Path, keep: bool, quick: bool, counts: str, only: str) -> None:
    """Measure, and print."""
    if quick:
        parameters, runs = QUICK_SIZE, QUICK_RUNS
    bench, machine = Bench(folder), this_machine()
    family = Family(folder / named("ray", parameters), ("base", "one", "two"), SFT_RMS, parameters)
    bench.demand_room(family)
    bench.prepare(family)
    took: dict[str, list[Took]] = {}
    try:
        for number in range(runs):
            say(f"Round {number + 1} of {runs}")
            for label, command in _commands(bench, family, only.split(","), [int(one) for one in counts.split(",")]):
                bench.clear()
                bench.output.mkdir()
                os.sync()
                took.setdefault(label, []).append(one := run(command, family.nbytes))
                say(f"  {label}: {one.wall:.1f} s, {one.rate:.2f} GB/s, processor {one.processor:.1f} s")
    finally:
        bench.clear()
        if not keep:
            family.remove()
    heading = (
        f"Workers with one thread each, medians of {runs} with the least and the most; models of "
        f"{family.parameters / 1e9:.2g} B parameters ({size(family.nbytes)}), in the page cache. {machine}."
    )
    others = [one.others for of in took.values() for one in of]
    notes = [f"Meanwhile everything else kept {spread(others)} of {machine.cores} cores busy."]
    if median(others) > DISTURBED * machine.cores:
        notes[0] += " The times are too long: measure again when it is idle."
    if max(map(int, counts.split(","))) > machine.cores:
        notes.append(f"More workers than the {machine.cores} cores share them.")
    data: dict[str, Any] = {"machine": machine.as_data()}
    data["runs"] = {label: [asdict(one) for one in of] for label, of in took.items()}
    publish(folder, "ray", heading, [_table(took)], notes, data)


def _commands(
    bench: Bench, family: Family, methods: Sequence[str], counts: Sequence[int]
) -> Sequence[tuple[str, list[str]]]:
    """Return the runs of a round, by method, number of workers and how."""
    base, *tuned = map(str, family.models)
    commands = []
    for method in methods:
        each, shared = METHODS[method]
        recipe = bench.folder / f"ray-{method}.yml"
        models = [{"model": model, "parameters": dict(each)} for model in tuned]
        recipe.write_text(
            json.dumps({"merge_method": method, "models": models, "parameters": dict(shared)} | _base(method, base))
        )
        for count in counts:
            command = [bench.program, "merge", str(recipe), "-o", str(bench.output / "model"), "--json"]
            commands.append((f"{method}|{count}|plain", [*command, "--threads", str(count)]))
            commands.append((f"{method}|{count}|ray", [*command, "--ray", f"local:{count}"]))
    return commands


def _base(method: str, base: str) -> dict[str, str]:
    return {} if method == "linear" else {"base_model": base}


def _table(took: Mapping[str, Sequence[Took]]) -> Table:
    rows = []
    for label, of in took.items():
        method, count, how = label.split("|")
        rows.append(
            (
                f"{method}, {how}",
                count,
                spread([one.wall for one in of], 1),
                spread([one.rate for one in of]),
                spread([one.processor for one in of], 1),
                spread([one.workers for one in of], 1),
            )
        )
    columns = ("merge", "workers", "wall, s", "made by workers, GB/s", "processor, s", "of workers, s")
    return Table("Workers of Ray and of a plain run", columns, rows)


if __name__ == "__main__":
    main()
