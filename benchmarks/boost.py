"""Measure the cost of a whole search beyond generating and scoring its answers, on the pair of ``make demo``.

python -m benchmarks.boost

Three commands take turns: ``boost`` as ``make demo-boost`` calls it, the same with ``--no-kl``, and a plain script that
loads the model once and makes and scores as many answers to the same questions (``benchmarks.answers_alone``). The
first two are measured as whole processes, from start to end; of the script also the time within generating and scoring.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import click

from benchmarks.machine import this_machine
from benchmarks.processes import measured
from benchmarks.tables import Table, publish, spread
from demo import boost

ALONE = "generating and scoring alone"
Took = Mapping[str, float]  # "wall" and "cpu", seconds


@click.command()
@click.option("--pair", type=click.Path(exists=True, path_type=Path), default="demo/out", show_default=True)
@click.option("--seed", default=0, show_default=True, help="That the pair was trained with.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Turns.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(__file__).parent / "out", help="For results.")
def main(pair: Path, seed: int, runs: int, folder: Path) -> None:
    """Measure, and print a table."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as the demo does
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "questions.jsonl"
    boost.write_questions(prompts, seed)
    turns = [turn(pair, prompts, folder) for _ in range(runs)]
    rows = [row(name, turns) for name in turns[0]]
    columns = ("", "wall, s", "CPU, s", f"wall, × {ALONE}", "CPU, ×")
    questions = len(prompts.read_text().splitlines())
    answers = json.loads((folder / "alone.json").read_text())["answers"]
    title = f"A search over {questions:,} questions, {answers:,} answers in all: medians of {runs} (range)"
    notes = [f"Measured on {this_machine()}; one thread."]
    publish(folder, "boost", "# Boost", [Table(title, columns, rows)], notes, {"turns": turns})


def turn(pair: Path, prompts: Path, folder: Path) -> dict[str, Took]:
    """Every command once."""
    output, report = folder / "boosted", folder / "alone.json"
    search = output.with_name("boosted.boost")
    plain = [sys.executable, "-m", "benchmarks.answers_alone", *map(str, (pair, prompts, search, report))]
    command = boost.command(pair, prompts, output)
    took = {}
    for name, words in [
        ("`boost --no-kl`", [*command, "--no-kl"]),
        ("`boost`", command),
        ("a script that generates and scores", plain),
    ]:
        if words is not plain:
            for left in (output, search):
                shutil.rmtree(left, ignore_errors=True)
        run = measured(words)
        took[name] = {"wall": run.wall, "cpu": run.user + run.system}
        click.echo(f"  {name}: {run.wall:.1f} s, {run.user + run.system:.1f} s of processor time", err=True)
    return {**took, ALONE: json.loads(report.read_text())}


def row(name: str, turns: Sequence[Mapping[str, Took]]) -> list[str]:
    """Return a table row: a command's times, and their ratios to those of the answers alone in the same turn."""
    times = [spread([turn[name][kind] for turn in turns], 1) for kind in ("wall", "cpu")]
    ratios = [median(turn[name][kind] / turn[ALONE][kind] for turn in turns) for kind in ("wall", "cpu")]
    return [name, *times, *(f"{ratio:.2f}" for ratio in ratios)]


if __name__ == "__main__":
    main()
