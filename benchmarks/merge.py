"""Speed and memory of ``mergekit-lite merge``, beside ``cp`` and mergekit, and against the project's aims.

    python -m benchmarks.merge [--size 1.5e9] [--runs 3] [--only ties,sce] [--mergekit PATH] [--folder DIR] [--quick]

A base and two fine-tunes that differ from it as supervised fine-tuning leaves them. See
``benchmarks.bench``; mergekit runs each recipe once, where it is given, after everything else.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.bench import COPY, Bench, crowded, disturbance, named, options, say
from benchmarks.checkpoints import SFT_RMS, Family
from benchmarks.machine import this_machine
from benchmarks.processes import Run
from benchmarks.tables import Table, publish, size, spread


@dataclass(frozen=True)
class Merge:
    """A recipe to measure.

    Attributes:
        method: its merge method.
        faster: the aim, times as fast as mergekit.
        each: parameters of each fine-tune.
        shared: of all.
        base: how the base takes part: ``base_model``, ``model`` among the others, or ``both``.
        models: fewest and most fine-tunes.
        known: whether mergekit has the method.
    """

    method: str
    faster: float | None = None
    each: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    base: str = "base_model"
    models: tuple[int, float] = (1, float("inf"))
    known: bool = True

    @property
    def label(self) -> str:
        """The method, and what is set for all."""
        return ", ".join([self.method, *(f"{key} {value}" for key, value in self.shared.items() if key != "t")])

    def takes(self, family: Family) -> bool:
        """Return whether the family has enough fine-tunes."""
        return len(family.names) > self.models[0]

    def recipe(self, family: Family) -> dict[str, Any]:
        """Return the recipe with as many of a family's models as it takes."""
        base, *tuned = family.models
        tuned = tuned[: int(min(self.models[1], len(tuned)))]
        listed = tuned if self.base == "base_model" else [base, *tuned]
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "models": [{"model": str(model), "parameters": dict(self.each)} for model in listed],
            "parameters": dict(self.shared),
            "dtype": "bfloat16",
        }
        return recipe if self.base == "model" else recipe | {"base_model": str(base)}


HALF = {"weight": 0.5, "density": 0.5}
MERGES = (
    Merge("linear", 6, {"weight": 0.5}, base="model"),
    Merge("task_arithmetic", 6, {"weight": 0.5}),
    Merge("slerp", 5, shared={"t": 0.4}, base="both", models=(1, 1)),
    Merge("model_stock", 3.5, models=(2, float("inf"))),
    Merge("sce", 8),
    Merge("sce", 8, shared={"select_topk": 0.1}),
    Merge("dare_linear", 8, HALF),
    Merge("dare_ties", 8, HALF),
    Merge("ties", 20, HALF),
    Merge("breadcrumbs_ties", 20, HALF | {"gamma": 0.01}),
    Merge("della", 8, HALF | {"epsilon": 0.1}),
    Merge("della_linear", 8, HALF | {"epsilon": 0.1}),
    Merge("varm", known=False),
)
# The aims beside those.
AIM_LARGE = 8.0  # times as fast as mergekit, for models of this many parameters on, where start-up weighs little:
LARGE = 2.4e9
AIM_PEAK = 700e6  # bytes, whatever the tensors' size and the number of models
AIM_PLAN = 5.0  # seconds, for 45,000 tensors

QUICK_SIZE, QUICK_RUNS = 5e7, 2
LONE_TENSOR = 1e9  # parameters at most
MANY = 8  # fine-tunes
MANY_SIZE = 1 / 4  # of the parameters, each
PLAN = "plan of {:,} tensors in each of three models"


@click.command()
@options(runs=3)
@click.option("--only", metavar="METHODS", help="These alone, separated by commas.")
@click.option("--tuned", type=click.IntRange(1), default=2, show_default=True, help="Fine-tunes beside the base.")
def main(
    parameters: float,
    runs: int,
    folder: Path,
    keep: bool,
    quick: bool,
    mergekit: str | None,
    only: str | None,
    tuned: int,
) -> None:
    """Measure merges and judge them by the project's aims."""
    if quick:
        parameters, runs = QUICK_SIZE, QUICK_RUNS
    bench = Bench(folder)
    family = _family(bench, "merge", parameters, tuned)
    merges = [merge for merge in _chosen(only) if merge.takes(family)]
    bench.demand_room(family)
    machine = this_machine()
    say(str(machine))
    notes: list[str] = []
    try:
        bench.prepare(family)
        notes += crowded(family)
        ours = {merge.label: _merge(bench, merge, family) for merge in merges}
        results = bench.rounds({COPY: bench.copying(family)} | ours, runs)
        peaks = _peaks(bench, merges, parameters, notes)
        results |= _planning(bench)
        theirs = _by_mergekit(bench, merges, family, mergekit, notes)
    finally:
        bench.clear()
        if not keep:
            family.remove()
    notes += disturbance(results, machine.cores)
    heading = (
        f"Medians of {runs} runs, least and most in brackets; mergekit and everything else that is a single figure ran "
        f"once. The fine-tunes differ from the base by an rms of {SFT_RMS:g}, rounded to bfloat16. {machine}."
    )
    tables = [
        _speeds(family, merges, results, theirs, judged=not quick),
        _memory(family, merges, results, peaks),
        Table("Aims for all", ("aim", "measured", "verdict"), _verdicts(merges, results, peaks, judged=not quick)),
    ]
    data = {
        "machine": machine.as_data(),
        "parameters": family.parameters,
        "runs": {label: [asdict(run) for run in of_label] for label, of_label in results.items()},
        "mergekit": {label: asdict(run) for label, run in theirs.items()},
        "peaks": peaks,
    }
    publish(folder, "merge", heading, tables, notes, data)


def _chosen(only: str | None) -> list[Merge]:
    """Return the merges of the named methods, without names all. Raises BadParameter."""
    if only is None:
        return list(MERGES)
    names = {name.strip() for name in only.split(",")}
    if unknown := names - {merge.method for merge in MERGES}:
        raise click.BadParameter(f"no benchmark merges by {', '.join(sorted(unknown))}.", param_hint="--only")
    return [merge for merge in MERGES if merge.method in names]


def _family(bench: Bench, name: str, parameters: float, tuned: int, kind: str = "model") -> Family:
    names = ("base", *(f"tuned-{number + 1}" for number in range(tuned)))
    return Family(bench.folder / named(name, parameters), names, SFT_RMS, parameters, kind)


def _written(merge: Merge, family: Family) -> Path:
    """Write the recipe of a merge to a file, as JSON, which is YAML."""
    path = family.folder / f"{merge.label.replace(', ', '-').replace(' ', '-')}.yml"
    path.write_text(json.dumps(merge.recipe(family), indent=1))
    return path


def _merge(bench: Bench, merge: Merge, family: Family) -> list[str]:
    """Return the command under test."""
    output = bench.output / f"merged{family.models[0].suffix}"
    return [bench.program, "merge", str(_written(merge, family)), "-o", str(output), "--quiet"]


def _by_mergekit(
    bench: Bench, merges: Sequence[Merge], family: Family, mergekit: str | None, notes: list[str]
) -> dict[str, Run]:
    """Run the same recipes through mergekit, once each, and note its failures."""
    runs: dict[str, Run] = {}
    if mergekit is None:
        notes.append("mergekit was not run: --mergekit PATH names its mergekit-yaml.")
        return runs
    for merge in merges:
        if not merge.known:
            continue
        recipe = _written(merge, family)
        if done := bench.run_mergekit(mergekit, f"mergekit, {merge.label}", recipe, family, notes):
            [runs[merge.label]] = done
    return runs


def _peaks(bench: Bench, merges: Sequence[Merge], parameters: float, notes: list[str]) -> dict[str, dict[str, int]]:
    """Peak memory of each merge of other models: of one tensor, of many models."""
    others = (
        _family(bench, "tensor", min(LONE_TENSOR, parameters * 2 / 3), 2, "tensor"),
        _family(bench, "many", parameters * MANY_SIZE, MANY),
    )
    peaks: dict[str, dict[str, int]] = {}
    for family in others:
        label = (
            f"one tensor of {size(family.nbytes)}"
            if family.kind == "tensor"
            else f"{MANY} fine-tunes of {size(family.nbytes)}"
        )
        if missing := bench.missing_room(family):
            notes.append(f"Memory with {label}: not measured, {missing}.")
            continue
        try:
            bench.prepare(family)
            peaks[label] = {
                merge.label: bench.run(f"{merge.label}, {label}", _merge(bench, merge, family)).peak
                for merge in merges
                if merge.models[1] >= len(family.names) - 1 or family.kind == "tensor"
            }
        finally:
            bench.clear()
            family.remove()
    return peaks


def _planning(bench: Bench) -> dict[str, list[Run]]:
    """Planning of models with very many tensors."""
    from benchmarks.plan import prepare, tensors

    label = PLAN.format(len(tensors()))
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        return bench.rounds({label: [bench.program, "plan", str(prepare(Path(folder)))]}, 3)


def _speeds(
    family: Family,
    merges: Sequence[Merge],
    results: Mapping[str, Sequence[Run]],
    theirs: Mapping[str, Run],
    judged: bool,
) -> Table:
    """Every merge beside cp and, where it was run, mergekit."""
    copies = results[COPY]
    rows = [[COPY, *_own(copies), *[""] * 5]]
    for merge in merges:
        runs, other = results[merge.label], theirs.get(merge.label)
        over_copy = spread([run.wall / copy.wall for run, copy in zip(runs, copies, strict=True)], 1)
        row = [merge.label, *_own(runs), over_copy, "", "", "", ""]
        if other:
            faster = other.wall / median(run.wall for run in runs)
            row[4:] = [
                over_copy,
                f"{other.wall:.1f}",
                size(other.peak),
                f"{faster:.1f} ×",
                _aim(merge, family, faster, judged),
            ]
        rows.append(row)
    columns = ("whole process", "wall, s", "cpu, s", "peak memory", "wall over cp's")
    theirs_columns = ("mergekit's wall, s", "its peak memory", "faster", "aim")
    title = (
        f"{len(family.names)} models of {family.parameters / 1e9:.2g} B parameters in bf16, {size(family.nbytes)} each"
    )
    return Table(title, (*columns, *theirs_columns), rows)


def _own(runs: Sequence[Run]) -> list[str]:
    cpu = median(run.user + run.system for run in runs)
    return [spread([run.wall for run in runs]), f"{cpu:.1f}", size(max(run.peak for run in runs))]


def _aim(merge: Merge, family: Family, faster: float, judged: bool) -> str:
    aim = max(merge.faster, AIM_LARGE) if merge.faster and family.parameters >= LARGE else merge.faster
    return "" if aim is None else f"{aim:g} ×, {_verdict(faster >= aim, judged)}"


def _memory(
    family: Family,
    merges: Sequence[Merge],
    results: Mapping[str, Sequence[Run]],
    peaks: Mapping[str, Mapping[str, int]],
) -> Table:
    """Peak memory of every merge, of what was timed and of other models."""
    first = f"{len(family.names) - 1} fine-tunes of {size(family.nbytes)}"
    rows = []
    for merge in merges:
        others = [of_label.get(merge.label) for of_label in peaks.values()]
        most = max(run.peak for run in results[merge.label])
        rows.append([merge.label, size(most), *("" if peak is None else size(peak) for peak in others)])
    return Table("Peak memory whatever the models", ("merge", first, *peaks), rows)


def _verdicts(
    merges: Sequence[Merge],
    results: Mapping[str, Sequence[Run]],
    peaks: Mapping[str, Mapping[str, int]],
    judged: bool,
) -> list[tuple[str, str, str]]:
    """Return the aims that hold for all merges."""
    timed = [(run.peak, merge.label) for merge in merges for run in results[merge.label]]
    other = [(peak, f"{label}, {models}") for models, of_label in peaks.items() for label, peak in of_label.items()]
    peak, which = max(timed + other)
    rows = [(f"peak memory ≤ {size(AIM_PEAK)}", f"{size(peak)} at most: {which}", _verdict(peak <= AIM_PEAK, judged))]
    for label, runs in results.items():
        if label.startswith("plan"):
            walls = [run.wall for run in runs]
            rows.append((f"{label} < {AIM_PLAN:g} s", f"{spread(walls)} s", _verdict(median(walls) < AIM_PLAN, judged)))
    return rows


def _verdict(met: bool, judged: bool) -> str:
    return ("met" if met else "not met") if judged else "not judged"


if __name__ == "__main__":
    main()
