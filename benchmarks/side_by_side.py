"""Measure what a search gains from processes, or servers, that measure side by side, on the pair of ``make demo``.

python -m benchmarks.side_by_side                                              # boost --parallel 1, then 2
python -m benchmarks.side_by_side --serve-command 'SERVER {model} {port} …'    # boost --servers 1, then 2

The commands take turns, each as a whole process, from start to end, and may use the same cores: one process computes
with a thread for each, several share them. With servers, say in their command how many threads each takes. The search
is a grid of four alphas with every answer of each, so that both measure the same. Rows are compared: with another
number of threads sums may differ in their last bits, and with them, rarely, an answer.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.machine import this_machine
from benchmarks.processes import Run, measured
from benchmarks.tables import Table, publish, spread
from demo import boost, task

BATCH = 50
SEARCH = ("--search", "grid", "--grid", "0.5,1,2,4", "--all-items", "--held-out", "0", "--no-kl", "--quiet")


@click.command()
@click.option("--pair", type=click.Path(exists=True, path_type=Path), default="demo/out", show_default=True)
@click.option("--seed", default=0, show_default=True, help="That the pair was trained with.")
@click.option("--questions", type=click.IntRange(1), default=800, show_default=True, help="Of each candidate.")
@click.option("--most", type=click.IntRange(2), default=2, show_default=True, help="Processes, or servers.")
@click.option("--serve-command", help="As of boost: measure --servers instead of --parallel.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Turns.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(__file__).parent / "out", help="For results.")
def main(pair: Path, seed: int, questions: int, most: int, serve_command: str | None, runs: int, folder: Path) -> None:
    """Measure, and print a table."""
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "questions.jsonl"
    boost.write_questions(prompts, seed)
    option = "--parallel" if serve_command is None else "--servers"
    given = ["--limit", str(questions), *(("--serve-command", serve_command) if serve_command is not None else ())]
    taken: dict[str, list[Run]] = {f"`{option} {number}`": [] for number in (1, most)}
    searches = {}
    for _ in range(runs):
        for name, runs_so_far in taken.items():
            output = folder / "side-by-side"
            for left in (output, output.with_name(f"{output.name}.boost")):
                shutil.rmtree(left, ignore_errors=True)
            runs_so_far.append(measured([*command(pair, prompts, output), *given, *name.strip("`").split()]))
            searches[name] = rows_of(output.with_name(f"{output.name}.boost"))
            click.echo(f"  {name}: {told(runs_so_far[-1])}", err=True)
    title = f"A grid of four alphas, {questions:,} questions each: medians of {runs} (range)"
    columns = ("", "wall, s", f"× {next(iter(taken))}", "processor time, s", "cores that others took")
    one, several = searches.values()
    same = sum(several.get(key) == row for key, row in one.items())
    notes = [
        f"Measured on {this_machine()}; {os.environ['OMP_NUM_THREADS']} threads in all.",
        f"{same:,} of {len(one):,} rows are the same.",
    ]
    turns = {name: [vars_of(run) for run in each] for name, each in taken.items()}
    publish(folder, "side_by_side", "# Side by side", [Table(title, columns, rows(taken))], notes, {"turns": turns})


def command(pair: Path, prompts: Path, output: Path) -> list[str]:
    """The search by the command that a user would type."""
    words = [sys.executable, "-m", "mergekit_lite", "boost", str(pair / "sft"), str(pair / "dpo")]
    words += ["--prompts", str(prompts), "--score", "function:demo.boost:right,name=right"]
    words += ["--temperature", "1", "--top-p", "1", "--max-tokens", str(task.MAX_ANSWER_TOKENS)]
    return [*words, "--batch-size", str(BATCH), *SEARCH, "-o", str(output)]


def rows_of(study: Path) -> dict[tuple[str, str], Any]:
    """What was measured, by candidate and item."""
    found = {}
    for file in (study / "candidates").glob("*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            found[file.name, row["item"]] = row
    return found


def vars_of(run: Run) -> dict[str, float | None]:
    """The figures of a run."""
    return {"wall": run.wall, "cpu": run.user + run.system, "others": run.others}


def told(run: Run) -> str:
    """The figures of a run, in words."""
    busy = "" if run.others is None else f", others took {run.others:.2f} cores"
    return f"{run.wall:.1f} s, {run.user + run.system:.1f} s of processor time{busy}"


def rows(taken: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """A row for each command; ratios are those of runs in the same turn."""
    first = next(iter(taken.values()))
    return [
        [
            name,
            spread([run.wall for run in runs], 1),
            f"{median(run.wall / alone.wall for run, alone in zip(runs, first, strict=True)):.2f}",
            spread([run.user + run.system for run in runs], 1),
            spread([run.others or 0.0 for run in runs], 2),
        ]
        for name, runs in taken.items()
    ]


if __name__ == "__main__":
    main()
