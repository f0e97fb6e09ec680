"""The parts that all benchmarks share: options, and running processes in turns, each from a clean state.

Everything is a whole process, measured from start to end. The processes take turns, so that a slower minute of the
machine meets them all, and ratios are taken within a turn. Before each one the last output is removed and the disk is
given time to settle: otherwise the kernel makes a process wait for pages that the one before it left to be written. The
memory for all that was written to once, as a virtual machine's first use of it is slow. The inputs are in the page
cache; ``cp``'s output ends there, ours too but for what was quicker to write to the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import IO, Any

import click

from benchmarks.checkpoints import Family
from benchmarks.machine import available_memory, fill_memory
from benchmarks.processes import Run, measured
from benchmarks.tables import size, spread

SLACK = 2e9  # bytes of disk left alone
DISTURBED = 0.1  # share of the machine that others took, worth a warning
COPY = "cp -r of one checkpoint"

Command = Callable[..., Any]


def options(runs: int) -> Callable[[Command], Command]:
    """Add the options of every benchmark; ``runs`` is a default."""
    chosen = [
        click.option(
            "--size", "parameters", type=click.FloatRange(4e7), default=1.5e9, show_default=True, help="Parameters."
        ),
        click.option(
            "--runs", type=click.IntRange(1), default=runs, show_default=True, help="Counted runs of each command."
        ),
        click.option(
            "--folder",
            type=click.Path(path_type=Path, file_okay=False),
            default=Path(__file__).parent / "out",
            help="For checkpoints, outputs and results.  [default: benchmarks/out]",
        ),
        click.option(
            "--keep", is_flag=True, help="Leave the checkpoints that times are measured on for the next time."
        ),
        click.option("--quick", is_flag=True, help="A smoke test: 50 M parameters, 2 runs, no verdicts."),
        click.option(
            "--mergekit", type=click.Path(exists=True), metavar="PATH", help="A mergekit-yaml to compare with."
        ),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(chosen):
            command = option(command)
        return command

    return decorate


class Bench:
    """Measures commands that write into one folder of outputs."""

    def __init__(self, folder: Path) -> None:
        """Checkpoints and outputs go to ``folder``. Raises ClickException where mergekit-lite isn't installed."""
        self.folder = folder
        self.output = folder / "output"
        found = shutil.which("mergekit-lite", path=f"{Path(sys.executable).parent}{os.pathsep}{os.get_exec_path()}")
        if found is None:
            raise click.ClickException("mergekit-lite is not installed beside this Python: pip install -e .")
        self.program = found

    def missing_room(self, family: Family, outputs: int = 1) -> str | None:
        """Return a message about the disk space that a family and its outputs lack."""
        self.folder.mkdir(parents=True, exist_ok=True)
        inputs = 0 if family.is_made() else len(family.names)
        needed = (inputs + outputs) * family.nbytes + SLACK
        free = shutil.disk_usage(self.folder).free
        return f"{self.folder} has {size(free)} free, this needs {size(needed)}" if free < needed else None

    def demand_room(self, family: Family, outputs: int = 1) -> None:
        """Raise ClickException if the disk has too little space for a family and its outputs."""
        if missing := self.missing_room(family, outputs):
            raise click.ClickException(f"{missing}. --folder chooses another disk, --size a smaller model.")

    def prepare(self, family: Family) -> None:
        """Make the family unless it is there, and bring it into the page cache."""
        if not family.is_made():
            say(f"Making {len(family.names)} checkpoints of {size(family.nbytes)} in {family.folder}")
            subprocess.run([sys.executable, "-m", "benchmarks.checkpoints", family.as_json()], check=True)
        warm(family)

    def run(self, label: str, command: Sequence[str]) -> Run:
        """Measure one process, with no output of an earlier one left and nothing waiting to be written."""
        self.clear()
        self.output.mkdir()
        self.settle()
        run = measured(command)
        say(f"  {label}: {run.wall:.2f} s, {size(run.peak)}")
        return run

    def settle(self) -> None:
        """Leave nothing that waits to be written, and no memory that nothing is in."""
        os.sync()
        fill_memory(self._holes)

    @cached_property
    def _holes(self) -> IO[bytes]:
        """A file without a name, whose pages are in the page cache as long as it is open."""
        return tempfile.TemporaryFile(dir=self.folder, buffering=0)

    def rounds(self, commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[Run]]:
        """Run all commands in turn, ``runs`` times after one turn that doesn't count.

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

    def run_mergekit(self, mergekit: str, label: str, recipe: Path, family: Family, notes: list[str]) -> list[Run]:
        """Measure what mergekit does for a recipe, and nothing beside, once; where it fails that is noted."""
        warm(family)  # the memory of an earlier run may have driven it out
        asked = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")
        try:
            return [self.run(label, [mergekit, str(recipe), str(self.output / "mergekit"), *asked])]
        except click.ClickException as error:
            notes.append(f"'{label}' failed: {error.message.splitlines()[-1]}")
            return []

    def copying(self, family: Family) -> list[str]:
        """``cp`` of one checkpoint, to compare with."""
        return ["cp", "-r", str(family.models[-1]), str(self.output / "copy")]

    def clear(self) -> None:
        """Remove the outputs."""
        shutil.rmtree(self.output, ignore_errors=True)


def warm(family: Family) -> None:
    """Read a family into the page cache, where it fits."""
    memory = available_memory()
    if memory is not None and memory < len(family.names) * family.nbytes:
        return
    say(f"Reading {family.folder} into the page cache")
    buffer = bytearray(1 << 22)
    for path in family.folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def crowded(family: Family, outputs: int = 1) -> list[str]:
    """Return a note if the checkpoints that a run reads and writes don't fit into the page cache."""
    needed, memory = (len(family.names) + outputs) * family.nbytes, available_memory()
    if memory is None or memory > needed:
        return []
    return [
        f"What is read and written, {size(needed)}, is more than the page cache holds: the times are the disk's too."
    ]


def disturbance(results: Mapping[str, Sequence[Run]], cores: int) -> list[str]:
    """Return notes on the load of the machine by other processes, with a warning if it shows in the figures."""
    others = [run.others for runs in results.values() for run in runs if run.others is not None]
    if not others:
        return []
    line = f"Meanwhile everything else on the machine kept {spread(others)} of {cores} cores busy."
    too_busy = median(others) > DISTURBED * cores
    return [f"{line} The times are too long: measure again when it is idle." if too_busy else line]


def named(kind: str, parameters: float) -> str:
    """``model-1500M``. No ``1.5e+09``: mergekit takes what follows a plus for an adapter."""
    return f"{kind}-{parameters / 1e6:.0f}M"


def say(line: str) -> None:
    """Print a line of progress."""
    click.echo(line, err=True)
