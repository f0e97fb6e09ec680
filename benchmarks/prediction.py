"""The prediction of ``plan`` and ``--dry-run`` beside real runs, method by method.

    python -m benchmarks.prediction [--size 5e8] [--runs 3] [--only ties,slerp] [--workers 1,2] [--cold] [--quick]

Each round asks for the prediction of a run, then makes that run. Times are compared in two ways: from start to end,
which holds on an idle machine only, and in processor time, which others' work disturbs less. With ``--cold`` the inputs
are dropped from the page cache before each of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from benchmarks.bench import Bench, disturbance, named, say
from benchmarks.checkpoints import SFT_RMS, Family
from benchmarks.machine import this_machine
from benchmarks.processes import Run, measured
from benchmarks.tables import Table, publish, size, spread
from mergekit_lite.prediction.costs import python_step

AIM = 0.2  # of a time
HALF = {"weight": 0.5, "density": 0.5}
QUICK_SIZE, QUICK_RUNS = 5e7, 1


@dataclass(frozen=True)
class Case:
    """A merge to predict: a recipe's method and parameters, whether it has a base, its models and their dtype."""

    label: str
    method: str
    each: Mapping[str, float] | None = None
    shared: Mapping[str, Any] | None = None
    base: bool = True
    models: int = 2
    dtype: str = "bfloat16"

    def recipe(self, folders: Sequence[Path]) -> dict[str, Any]:
        """Return the recipe; the first of the folders is the base."""
        base, *tuned = folders
        listed = tuned[: self.models]
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "models": [{"model": str(model), "parameters": dict(self.each or {})} for model in listed],
            "parameters": dict(self.shared or {}),
        }
        return recipe | ({"base_model": str(base)} if self.base else {})


CASES = (
    Case("extrapolate", "expo", shared={"alpha": 0.3}, models=1),
    Case("linear", "linear", {"weight": 0.5}, base=False),
    Case("slerp", "slerp", shared={"t": 0.4}, models=1),
    Case("karcher", "karcher", base=False),
    Case("ties", "ties", HALF),
    Case("ties, trim global", "ties", HALF, {"trim": "global"}),
    Case("dare_ties", "dare_ties", HALF),
    Case("breadcrumbs", "breadcrumbs", HALF | {"gamma": 0.01}),
    Case("della", "della", HALF | {"epsilon": 0.1}),
    Case("extrapolate, float32", "expo", shared={"alpha": 0.3}, models=1, dtype="float32"),
    Case("ties, float32", "ties", HALF, dtype="float32"),
    Case("extrapolate, from FP8", "expo", shared={"alpha": 0.3}, models=1, dtype="fp8"),
)


@dataclass(frozen=True)
class Pair:
    """A prediction and the run it was made of."""

    predicted: Mapping[str, Any]
    run: Run
    steps: tuple[float, float]  # seconds that a step of a loop in Python took, before the prediction and before the run

    @property
    def time(self) -> float:
        """Predicted over real seconds."""
        return float(self.predicted["seconds"]["total"]) / self.run.wall

    @property
    def processor(self) -> float:
        """Predicted over real seconds of processor time."""
        return float(self.predicted["processor_seconds"]) / (self.run.user + self.run.system)

    @property
    def memory(self) -> float:
        """Predicted over real peak of memory."""
        return float(self.predicted["memory"]) / self.run.peak


@click.command()
@click.option("--size", "parameters", type=click.FloatRange(4e7), default=5e8, show_default=True, help="Parameters.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are told.")
@click.option("--workers", default="1,2", show_default=True, help="Numbers of workers, separated by commas.")
@click.option("--only", metavar="LABELS", help="These alone, by the begin of their labels, separated by commas.")
@click.option("--cold", is_flag=True, help="Drop the inputs from the page cache before each prediction and run.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=Path(__file__).parent / "out",
    help="For checkpoints, outputs and results.  [default: benchmarks/out]",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave the checkpoints for the next time.")
@click.option("--quick", is_flag=True, help="A smoke test: 50 M parameters, one run, no verdicts.")
def main(
    parameters: float, runs: int, workers: str, only: str | None, cold: bool, folder: Path, keep: bool, quick: bool
) -> None:
    """Predict and run merges side by side."""
    if quick:
        parameters, runs = QUICK_SIZE, QUICK_RUNS
    bench = Bench(folder)
    family = Family(folder / named("prediction", parameters), ("base", "math", "code"), SFT_RMS, parameters)
    wide = replace(family, folder=family.folder.with_name(f"{family.folder.name}-float32"), dtype="float32")
    bench.demand_room(family, outputs=12)
    machine = this_machine()
    say(str(machine))
    labels = [] if only is None else only.split(",")
    cases = [case for case in CASES if not labels or any(case.label.startswith(label) for label in labels)]
    pairs: dict[str, list[Pair]] = {}
    try:
        bench.prepare(family)
        folders = {"bfloat16": family.models, "float32": wide.models}
        if any(case.dtype == "float32" for case in cases):
            bench.prepare(wide)
        if any(case.dtype == "fp8" for case in cases):
            folders["fp8"] = _in_fp8(bench, family)
        for number in range(runs):
            say(f"Round {number + 1} of {runs}")
            for case in cases:
                for count in map(int, workers.split(",")):
                    label = f"{case.label}|{count}"
                    pairs.setdefault(label, []).append(_pair(bench, case, folders[case.dtype], count, cold))
    finally:
        bench.clear()
        if not keep:
            family.remove()
            wide.remove()
            shutil.rmtree(_fp8_folder(family), ignore_errors=True)
    notes = disturbance({label: [pair.run for pair in of] for label, of in pairs.items()}, machine.cores)
    heading = (
        f"Predicted and real runs side by side, medians of {runs} with the least and the most; models of "
        f"{family.parameters / 1e9:.2g} B parameters ({size(family.nbytes)} in bfloat16), inputs "
        f"{'not in' if cold else 'in'} the page cache. {machine}."
    )
    data = {
        "machine": machine.as_data(),
        "cold": cold,
        "pairs": {label: [{**asdict(pair), "time": pair.time} for pair in of] for label, of in pairs.items()},
    }
    if not quick:
        notes = [_in_all(pairs), _pace(pairs), *notes]
    publish(folder, "prediction", heading, [_table(pairs, judged=not quick)], notes, data)


def _fp8_folder(family: Family) -> Path:
    return family.folder.with_name(f"{family.folder.name}-fp8")


def _in_fp8(bench: Bench, family: Family) -> tuple[Path, ...]:
    """Return the family's models in FP8, converted by the program itself where they aren't."""
    folder = _fp8_folder(family)
    folder.mkdir(exist_ok=True)
    made = tuple(folder / model.name for model in family.models)
    for model, converted in zip(family.models, made, strict=True):
        if not converted.exists():
            recipe = folder / "recipe.yml"
            recipe.write_text(
                json.dumps({"merge_method": "passthrough", "models": [{"model": str(model)}], "out_dtype": "fp8"})
            )
            subprocess.run([bench.program, "merge", str(recipe), "-o", str(converted), "-q"], check=True)
    return made


def _pair(bench: Bench, case: Case, folders: Sequence[Path], workers: int, cold: bool) -> Pair:
    """Predict a run and make it."""
    bench.clear()
    bench.output.mkdir(parents=True)
    recipe = bench.folder / "prediction-recipe.yml"
    recipe.write_text(json.dumps(case.recipe(folders)))
    out = bench.output / "model"
    command = [bench.program, "merge", str(recipe), "-o", str(out), "--threads", str(workers)]
    bench.settle()
    _settle(folders, cold)
    before = python_step()
    asked = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True)
    predicted = json.loads(asked.stdout)["prediction"]
    bench.settle()
    _settle(folders, cold)
    steps = before, python_step()
    pair = Pair(predicted, measured([*command, "-q"]), steps)
    say(
        f"  {case.label}, {workers}: predicted {predicted['seconds']['total']:.2f} s "
        f"(processor {predicted['processor_seconds']:.2f}), real {pair.run.wall:.2f} "
        f"({pair.run.user + pair.run.system:.2f}); {predicted['limit']} limits"
    )
    return pair


def _settle(folders: Sequence[Path], cold: bool) -> None:
    """Drop the models from the page cache, or bring them there."""
    for path in [file for folder in folders for file in folder.glob("*.safetensors")]:
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                shutil.copyfileobj(file, _NOWHERE, 1 << 22)


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


_NOWHERE: Any = _Nowhere()


def _table(pairs: Mapping[str, Sequence[Pair]], judged: bool) -> Table:
    rows = []
    for label, of in pairs.items():
        method, workers = label.split("|")
        errors = _errors(of)
        rows.append(
            (
                method,
                workers,
                f"{median(p.predicted['seconds']['total'] for p in of):.2f}",
                spread([p.run.wall for p in of]),
                f"{errors['time']:+.0%}",
                f"{median(p.predicted['processor_seconds'] for p in of):.2f}",
                spread([p.run.user + p.run.system for p in of]),
                f"{errors['cpu']:+.0%}",
                f"{errors['memory']:+.0%}",
                _verdict(errors) if judged else "not judged",
            )
        )
    columns = ("method", "workers", "predicted, s", "real, s", "error", "predicted cpu, s", "real cpu, s", "error",
               "error of memory", f"within {AIM:.0%}")  # fmt: skip
    return Table("Predicted and real", columns, rows)


def _errors(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return by how much predictions are too high: the median of time and processor time, the least of memory."""
    return {
        "time": median(pair.time for pair in pairs) - 1,
        "cpu": median(pair.processor for pair in pairs) - 1,
        "memory": min(pair.memory for pair in pairs) - 1,  # a peak may be missed by those who look for it
    }


def _verdict(errors: Mapping[str, float]) -> str:
    met = [name for name, error in errors.items() if abs(error) <= AIM]
    return "all" if len(met) == len(errors) else " and ".join(met) or "none"


def _pace(pairs: Mapping[str, Sequence[Pair]]) -> str:
    """Say how the machine's own pace changed meanwhile, which no prediction can know."""
    nanoseconds = [1e9 * step for of in pairs.values() for pair in of for step in pair.steps]
    low, _, high = quantiles(nanoseconds)
    return (
        f"A loop in Python took {spread(nanoseconds, 0)} ns of processor time a step, half of the times between "
        f"{low:.0f} and {high:.0f}: by so much the machine's own pace changed between predictions and runs."
    )


def _in_all(pairs: Mapping[str, Sequence[Pair]]) -> str:
    errors = [_errors(of) for of in pairs.values()]
    met = {name: sum(abs(each[name]) <= AIM for each in errors) for name in ("time", "cpu", "memory")}
    return (
        f"Within {AIM:.0%}: {met['time']} of {len(errors)} times, {met['cpu']} of {len(errors)} figures of processor "
        f"time, {met['memory']} of {len(errors)} of memory."
    )


if __name__ == "__main__":
    main()
