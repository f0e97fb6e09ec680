"""Speed and memory of ``mergekit-lite extrapolate``, measured beside ``cp`` and against the project's aims.

    python -m benchmarks.extrapolate [--size 1.5e9] [--runs 5] [--folder DIR] [--quick]

See ``benchmarks.bench``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import click

from benchmarks.bench import COPY, Bench, disturbance, named, options, say
from benchmarks.checkpoints import DPO_RMS, Family
from benchmarks.machine import available_memory, this_machine
from benchmarks.processes import Run, own_peak
from benchmarks.tables import Table, publish, size, spread

# The aims.
AIM_OVER_COPY = 1.3  # wall time of one extrapolation, over that of cp, beside
AIM_START_UP = 1.5  # seconds, most of which torch's import takes
AIM_PEAK = 600e6  # bytes, of the process
AIM_THREE_OVER_ONE = 2.5  # three alphas in one pass
AIM_HELP = 0.3  # seconds
AIM_GROWTH = 0.10  # of the peak, whatever the model's or the tensor's size

MODELS = ("sft", "aligned")
ALPHA, ALPHAS = "0.3", "0.1,0.3,0.5"
QUICK_SIZE, QUICK_RUNS = 5e7, 2
LARGER = 4  # times the size, to see that memory stays
LONE_TENSOR = 2 / 3  # of the size, in one tensor
WHOLE_MODELS = 3  # checkpoints' worth of memory that the plain way needs

COPIES = "cp -r of it, three times"
ONE = "extrapolate"
THREE = "extrapolate, three alphas in one pass"
HELP = "mergekit-lite --help"
TORCH = "python -c 'import torch'"
PLAIN = "both models in memory, bf16 arithmetic"
MERGEKIT = "mergekit, task arithmetic"
CUDA = "extrapolate --device cuda"
CUDA_START = "import torch, first use of the GPU"


@click.command()
@options(runs=5)
def main(parameters: float, runs: int, folder: Path, keep: bool, quick: bool, mergekit: str | None) -> None:
    """Measure extrapolation and judge it by the project's aims."""
    if quick:
        parameters, runs = QUICK_SIZE, QUICK_RUNS
    bench = Bench(folder)
    pair = _pair(bench, parameters)
    bench.demand_room(pair, outputs=3)
    machine = this_machine()
    say(str(machine))
    notes: list[str] = []
    try:
        bench.prepare(pair)
        results = bench.rounds(_commands(bench, pair, machine.gpu), runs)
        results |= _compared(bench, pair, mergekit, notes)
        gpu = _gpu_share(pair, results) if machine.gpu else None
        peaks = _peaks(bench, pair, results[ONE], notes)
    finally:
        bench.clear()
        if not keep:
            pair.remove()
    if gpu is None:
        notes.append("extrapolate --device cuda was not run: torch sees no GPU.")
    notes += disturbance(results, machine.cores)
    tables = [
        Table(
            f"{pair.parameters / 1e9:.2g} B parameters in bf16, {size(pair.nbytes)} a checkpoint",
            ("whole process, page cache warm", "wall, s", "user, s", "system, s", "peak memory"),
            [_row(label, of_label) for label, of_label in results.items()],
        ),
        Table(
            "Memory whatever the size",
            ("extrapolate", "peak memory", "against the first"),
            [
                (label, size(peak), f"{growth:+.1%}")
                for (label, peak), growth in zip(peaks.items(), _growths(peaks), strict=True)
            ],
        ),
        Table("Aims", ("aim", "measured", "verdict"), _verdicts(results, peaks, judged=not quick)),
    ]
    if gpu:
        tables.insert(1, Table("GPU", ("extrapolate --device cuda", "measured"), gpu))
    heading = f"Medians of {runs} runs, least and most in brackets; a single figure is a single run. {machine}."
    data = {
        "machine": machine.as_data(),
        "parameters": pair.parameters,
        "runs": {label: [asdict(run) for run in of_label] for label, of_label in results.items()},
        "peaks": peaks,
    }
    publish(folder, "extrapolate", heading, tables, notes, data)


def _pair(bench: Bench, parameters: float, kind: str = "model") -> Family:
    return Family(bench.folder / named(kind, parameters), MODELS, DPO_RMS, parameters, kind)


def _extrapolate(bench: Bench, pair: Family, *options: str, alpha: str = ALPHA) -> list[str]:
    """Return the command under test."""
    before, after = pair.models
    output = bench.output / f"{'expo' if ',' not in alpha else 'expo-{alpha}'}{after.suffix}"
    return [
        *(bench.program, "extrapolate", str(before), str(after), "--alpha", alpha, "-o", str(output), "--quiet"),
        *options,
    ]


def _commands(bench: Bench, pair: Family, gpu: str | None) -> dict[str, list[str]]:
    """Return the commands that take turns."""
    copy = 'for number in 1 2 3; do cp -r "$0" "$1-$number" || exit; done'
    commands = {
        COPY: bench.copying(pair),
        COPIES: ["sh", "-c", copy, str(pair.models[1]), str(bench.output / "copy")],
        ONE: _extrapolate(bench, pair),
        THREE: _extrapolate(bench, pair, alpha=ALPHAS),
        HELP: [str(bench.program), "--help"],
        TORCH: [sys.executable, "-c", "import torch"],
    }
    if gpu:
        commands[CUDA] = _extrapolate(bench, pair, "--device", "cuda")
        commands[CUDA_START] = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').item()"]
    return commands


def _compared(bench: Bench, pair: Family, mergekit: str | None, notes: list[str]) -> dict[str, list[Run]]:
    """Other ways to the same model, once each."""
    runs = {}
    before, after = map(str, pair.models)
    memory = available_memory()
    if memory is None or memory > WHOLE_MODELS * pair.nbytes:
        module = "benchmarks.whole_models_in_memory"
        runs[PLAIN] = [
            bench.run(PLAIN, [sys.executable, "-m", module, before, after, ALPHA, str(bench.output / "whole")])
        ]
    else:
        needed = size(WHOLE_MODELS * pair.nbytes)
        notes.append(f"'{PLAIN}' was not run: it needs {needed} of memory, {size(memory)} are available.")
    if mergekit:
        recipe = pair.folder / "mergekit.yml"
        model = {"model": after, "parameters": {"weight": 1 + float(ALPHA)}}
        recipe.write_text(  # JSON is YAML
            json.dumps(
                {"merge_method": "task_arithmetic", "base_model": before, "models": [model], "dtype": "bfloat16"}
            )
        )
        if done := bench.run_mergekit(mergekit, MERGEKIT, recipe, pair, notes):
            runs[MERGEKIT] = done
    else:
        notes.append("mergekit was not run: --mergekit PATH names its mergekit-yaml.")
    return runs


def _peaks(bench: Bench, pair: Family, runs: Sequence[Run], notes: list[str]) -> dict[str, int]:
    """Peak memory of one extrapolation: of the measured pair, of a larger model, of a model in one tensor."""
    peaks = {f"{size(pair.nbytes)} in two shards": round(median(run.peak for run in runs))}
    lone = _pair(bench, LONE_TENSOR * pair.size, "tensor")
    larger = _pair(bench, LARGER * pair.size)
    for label, other in (
        (f"one tensor of {size(lone.nbytes)}", lone),
        (f"{size(larger.nbytes)} in two shards", larger),
    ):
        if missing := bench.missing_room(other):
            notes.append(f"{label}: skipped, {missing}.")
            continue
        try:
            bench.prepare(other)
            peaks[label] = bench.run(label, _extrapolate(bench, other)).peak
        finally:
            bench.clear()
            other.remove()
    return peaks


def _growths(peaks: Mapping[str, int]) -> list[float]:
    """Each peak against the first."""
    first, *_ = peaks.values()
    return [peak / first - 1 for peak in peaks.values()]


def _gpu_share(pair: Family, results: Mapping[str, Sequence[Run]]) -> list[tuple[str, str]]:
    """Return table rows: the time that the bus allows, and the share of that speed that the run reached."""
    say("Copying through pinned memory")
    command = [sys.executable, "-m", "benchmarks.pinned_copies", str(pair.nbytes)]
    limit = float(subprocess.run(command, check=True, capture_output=True).stdout)
    turns = zip(results[CUDA], results[CUDA_START], strict=True)
    working = [run.wall - start.wall for run, start in turns]
    return [
        ("after start-up, s", spread(working)),
        ("pinned copies of the same bytes alone, s", f"{limit:.2f}"),
        ("share of that limit reached", f"{limit / median(working):.0%}"),
    ]


def _row(label: str, runs: Sequence[Run]) -> tuple[str, ...]:
    peak = median(run.peak for run in runs)
    least = own_peak()
    return (
        label,
        spread([run.wall for run in runs]),
        f"{median(run.user for run in runs):.2f}",
        f"{median(run.system for run in runs):.2f}",
        size(peak) if peak > least else f"≤ {size(least)}",
    )


def _verdicts(
    results: Mapping[str, Sequence[Run]], peaks: Mapping[str, int], judged: bool
) -> list[tuple[str, str, str]]:
    """Each aim, what was measured, and whether that meets it; ratios within a turn."""
    over_copy = [(one.wall - AIM_START_UP) / copy.wall for one, copy in zip(results[ONE], results[COPY], strict=True)]
    three_over_one = [three.wall / one.wall for three, one in zip(results[THREE], results[ONE], strict=True)]
    peak = max(run.peak for label in (ONE, THREE) for run in results[label])
    helps = [run.wall for run in results[HELP]]
    _, *growths = _growths(peaks)

    def verdict(met: bool) -> str:
        return ("met" if met else "not met") if judged else "not judged"

    rows = [
        (
            f"wall ≤ {AIM_OVER_COPY} × cp + {AIM_START_UP} s",
            f"{spread(over_copy)} × cp + {AIM_START_UP} s",
            verdict(median(over_copy) <= AIM_OVER_COPY),
        ),
        (f"peak memory ≤ {size(AIM_PEAK)}", f"{size(peak)}, the most of all runs", verdict(peak <= AIM_PEAK)),
        (
            f"three alphas ≤ {AIM_THREE_OVER_ONE} × one",
            f"{spread(three_over_one)} × one",
            verdict(median(three_over_one) <= AIM_THREE_OVER_ONE),
        ),
        (f"--help < {AIM_HELP} s", f"{spread(helps)} s", verdict(median(helps) < AIM_HELP)),
    ]
    if growths:
        growth = max(growths, key=abs)
        limit = f"peak memory ± {AIM_GROWTH:.0%} at other sizes"
        rows.append((limit, f"{growth:+.1%}", verdict(abs(growth) <= AIM_GROWTH)))
    return rows


if __name__ == "__main__":
    main()
