"""Speed and memory of ``mergekit-lite extrapolate``, measured beside ``cp`` and against the project's aims.

    python -m benchmarks.extrapolate [--size 1.5e9] [--runs 5] [--folder DIR] [--quick]

Everything is a whole process, measured from start to end. The processes take turns, so that a slower minute of the
machine meets them all, and ratios are taken within a turn. Before each one the last output is removed and the disk is
given time to settle: otherwise the kernel makes a process wait for pages that the one before it left to be written. The
inputs are in the page cache; the outputs end there too, for ``cp`` as for us.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import click

from benchmarks.checkpoints import Pair
from benchmarks.machine import available_memory, this_machine
from benchmarks.processes import Run, measured, own_peak
from benchmarks.tables import Table, size, spread

# The aims.
AIM_OVER_COPY = 1.3  # wall time of one extrapolation, over that of cp, beside
AIM_START_UP = 1.5  # seconds, most of which torch's import takes
AIM_PEAK = 600e6  # bytes, of the process
AIM_THREE_OVER_ONE = 2.5  # three alphas in one pass
AIM_HELP = 0.3  # seconds
AIM_GROWTH = 0.10  # of the peak, whatever the model's or the tensor's size

ALPHA, ALPHAS = "0.3", "0.1,0.3,0.5"
QUICK_SIZE, QUICK_RUNS = 5e7, 2
LARGER = 4  # times the size, to see that memory stays
LONE_TENSOR = 2 / 3  # of the size, in one tensor
SLACK = 2e9  # bytes of disk left alone
WHOLE_MODELS = 3  # checkpoints' worth of memory that the plain way needs
DISTURBED = 0.1  # share of the machine that others took, worth a warning

COPY = "cp -r of one checkpoint"
COPIES = "cp -r of it, three times"
ONE = "extrapolate"
THREE = "extrapolate, three alphas in one pass"
HELP = "mergekit-lite --help"
TORCH = "python -c 'import torch'"
PLAIN = "both models in memory, bf16 arithmetic"
MERGEKIT = "mergekit, task arithmetic"
CUDA = "extrapolate --device cuda"
CUDA_START = "import torch, first use of the GPU"


class Bench:
    """Measures commands that write into one folder of outputs."""

    def __init__(self, folder: Path) -> None:
        """Checkpoints and outputs go to ``folder``."""
        self.folder = folder
        self.output = folder / "output"
        self.program = shutil.which(
            "mergekit-lite", path=f"{Path(sys.executable).parent}{os.pathsep}{os.get_exec_path()}"
        )

    def pair(self, name: str, parameters: float, whole: bool = False) -> Pair:
        """The pair of this size in the folder, made or not."""
        return Pair(self.folder / name, parameters, whole)

    def missing_room(self, pair: Pair, outputs: int) -> str | None:
        """What the disk lacks for a pair and its outputs, in words."""
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = (0 if pair.is_made() else 2 * pair.nbytes) + outputs * pair.nbytes + SLACK
        free = shutil.disk_usage(self.folder).free
        return f"{self.folder} has {size(free)} free, this needs {size(needed)}" if free < needed else None

    def prepare(self, pair: Pair) -> None:
        """Make the pair unless it is there, and bring it into the page cache."""
        if not pair.is_made():
            say(f"Making two checkpoints of {size(pair.nbytes)} in {pair.folder}")
            kind = "whole" if pair.whole else "shards"
            arguments = [str(pair.folder), str(pair.size), kind]
            subprocess.run([sys.executable, "-m", "benchmarks.checkpoints", *arguments], check=True)
        say(f"Reading {pair.folder} into the page cache")
        buffer = bytearray(1 << 22)
        for path in pair.folder.rglob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def extrapolate(self, pair: Pair, *options: str, alpha: str = ALPHA) -> list[str]:
        """The command under test."""
        before, after = map(str, pair.models)
        suffix = after[len(str(pair.folder / "aligned")) :]
        output = str(self.output / ("expo" if "," not in alpha else "expo-{alpha}")) + suffix
        return [str(self.program), "extrapolate", before, after, "--alpha", alpha, "-o", output, "--quiet", *options]

    def run(self, label: str, command: Sequence[str]) -> Run:
        """Measure one process, with no output of an earlier one left and nothing waiting to be written."""
        self.clear()
        self.output.mkdir()
        os.sync()
        run = measured(command)
        say(f"  {label}: {run.wall:.2f} s, {size(run.peak)}")
        return run

    def rounds(self, commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[Run]]:
        """All commands in turn, ``runs`` times and once before that doesn't count.

        Every second round goes backwards: a process fares better after one that has just freed memory, and so none
        always follows the same one.
        """
        kept: dict[str, list[Run]] = {label: [] for label in commands}
        for number in range(runs + 1):
            say(f"Round {number} of {runs}" if number else "A round that doesn't count")
            for label in list(commands)[:: -1 if number % 2 else 1]:
                run = self.run(label, commands[label])
                if number:
                    kept[label].append(run)
        return kept

    def clear(self) -> None:
        """Remove the outputs."""
        shutil.rmtree(self.output, ignore_errors=True)


@click.command()
@click.option("--size", "parameters", type=click.FloatRange(4e7), default=1.5e9, show_default=True, help="Parameters.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Counted runs of each command.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).parent / "out",
    help="For checkpoints, outputs and results.  [default: benchmarks/out]",
)
@click.option("--quick", is_flag=True, help="A smoke test: 50 M parameters, 2 runs, no verdicts.")
@click.option("--mergekit", type=click.Path(exists=True), metavar="PATH", help="A mergekit-yaml to compare with.")
def main(parameters: float, runs: int, folder: Path, quick: bool, mergekit: str | None) -> None:
    """Measure extrapolation and judge it by the project's aims."""
    if quick:
        parameters, runs = QUICK_SIZE, QUICK_RUNS
    bench = Bench(folder)
    if bench.program is None:
        raise click.ClickException("mergekit-lite is not installed beside this Python: pip install -e .")
    pair = bench.pair(f"model-{parameters:g}", parameters)
    if missing := bench.missing_room(pair, outputs=3):
        raise click.ClickException(f"{missing}. --folder chooses another disk, --size a smaller model.")
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
    if gpu is None:
        notes.append("extrapolate --device cuda was not run: torch sees no GPU.")
    notes += _disturbance(results, machine.cores)
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
    for table in tables:
        table.show()
    click.echo("\n".join([heading, *notes]))
    text = "\n".join([heading, "", *(table.markdown() for table in tables), *(f"- {note}" for note in notes), ""])
    (folder / "results.md").write_text(text)
    data = {
        "machine": machine.as_data(),
        "parameters": pair.parameters,
        "runs": {label: [asdict(run) for run in of_label] for label, of_label in results.items()},
        "peaks": peaks,
        "tables": [asdict(table) for table in tables],
        "notes": notes,
    }
    (folder / "results.json").write_text(json.dumps(data, indent=1))
    say(f"Written: {folder / 'results.md'}, {folder / 'results.json'}. {pair.folder} stays for the next time.")


def say(line: str) -> None:
    """A line of progress."""
    click.echo(line, err=True)


def _commands(bench: Bench, pair: Pair, gpu: str | None) -> dict[str, list[str]]:
    """What takes turns."""
    copy = 'for number in 1 2 3; do cp -r "$0" "$1-$number" || exit; done'
    commands = {
        COPY: ["cp", "-r", str(pair.models[1]), str(bench.output / "copy")],
        COPIES: ["sh", "-c", copy, str(pair.models[1]), str(bench.output / "copy")],
        ONE: bench.extrapolate(pair),
        THREE: bench.extrapolate(pair, alpha=ALPHAS),
        HELP: [str(bench.program), "--help"],
        TORCH: [sys.executable, "-c", "import torch"],
    }
    if gpu:
        commands[CUDA] = bench.extrapolate(pair, "--device", "cuda")
        commands[CUDA_START] = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').item()"]
    return commands


def _compared(bench: Bench, pair: Pair, mergekit: str | None, notes: list[str]) -> dict[str, list[Run]]:
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
        recipe = bench.folder / "mergekit.yaml"
        model = {"model": after, "parameters": {"weight": 1 + float(ALPHA)}}
        recipe.write_text(  # JSON is YAML
            json.dumps(
                {"merge_method": "task_arithmetic", "base_model": before, "models": [model], "dtype": "bfloat16"}
            )
        )
        command = [mergekit, str(recipe), str(bench.output / "mergekit"), "--no-copy-tokenizer"]
        runs[MERGEKIT] = [bench.run(MERGEKIT, command)]
    else:
        notes.append("mergekit was not run: --mergekit PATH names its mergekit-yaml.")
    return runs


def _peaks(bench: Bench, pair: Pair, runs: Sequence[Run], notes: list[str]) -> dict[str, int]:
    """Peak memory of one extrapolation: of the measured pair, of a larger model, of a model in one tensor."""
    peaks = {f"{size(pair.nbytes)} in two shards": round(median(run.peak for run in runs))}
    lone = bench.pair(f"tensor-{pair.size:g}", LONE_TENSOR * pair.size, whole=True)
    larger = bench.pair(f"model-{LARGER * pair.size:g}", LARGER * pair.size)
    for label, other in (
        (f"one tensor of {size(lone.nbytes)}", lone),
        (f"{size(larger.nbytes)} in two shards", larger),
    ):
        if missing := bench.missing_room(other, outputs=1):
            notes.append(f"{label}: skipped, {missing}.")
            continue
        try:
            bench.prepare(other)
            peaks[label] = bench.run(label, bench.extrapolate(other)).peak
        finally:
            bench.clear()
            shutil.rmtree(other.folder, ignore_errors=True)  # only the pair that times are measured on stays
    return peaks


def _growths(peaks: Mapping[str, int]) -> list[float]:
    """Each peak against the first."""
    first, *_ = peaks.values()
    return [peak / first - 1 for peak in peaks.values()]


def _gpu_share(pair: Pair, results: Mapping[str, Sequence[Run]]) -> list[tuple[str, str]]:
    """What the bus allows, and how near the run came to it."""
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


def _disturbance(results: Mapping[str, Sequence[Run]], cores: int) -> list[str]:
    """How busy the machine was with other things, and a warning where that shows in the figures."""
    others = [run.others for runs in results.values() for run in runs if run.others is not None]
    if not others:
        return []
    line = f"Meanwhile everything else on the machine kept {spread(others)} of {cores} cores busy."
    too_busy = median(others) > DISTURBED * cores
    return [f"{line} The times are too long: measure again when it is idle." if too_busy else line]


if __name__ == "__main__":
    main()
