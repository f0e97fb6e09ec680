"""Measure ``moe`` and a copy of what it made, in turns, as whole processes: eight experts of 1.5 billion parameters.

python -m benchmarks.moe                                      (needs 24 GB for models, 40 GB for a mixture and its copy)
python -m benchmarks.moe --parameters 1e8 --runs 5
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click

from benchmarks.checkpoints import SFT_RMS, Family
from benchmarks.processes import Run, measured
from benchmarks.tables import Table, size, spread

AIM_OVER_COPY = 1.3  # wall time of building, over that of copying the output
RECIPE = "base_model: {base}\ngate_mode: random\nexperts:\n"


@click.command()
@click.option("--parameters", default=1.5e9, show_default=True, help="Of each model.")
@click.option("--experts", type=click.IntRange(2), default=8, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="For the models; a temporary one by default.")
def main(parameters: float, experts: int, runs: int, folder: Path | None) -> None:
    """Build and copy in turns, and print."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        place = Path(made)
        names = tuple(f"expert-{number}" for number in range(experts))
        family = Family(place / "models", names, SFT_RMS, parameters)
        # In a process of its own, so that this one stays small: a child's peak is never below its parent's.
        subprocess.run([sys.executable, "-m", "benchmarks.checkpoints", family.as_json()], check=True)
        recipe, out, copy = place / "moe.yml", place / "mixture", place / "copy"
        recipe.write_text(
            RECIPE.format(base=family.models[0]) + "".join(f"- source_model: {m}\n" for m in family.models)
        )
        built, copied = [], []
        for _ in range(runs):
            shutil.rmtree(out, ignore_errors=True)
            built.append(measured([sys.executable, "-m", "mergekit_lite", "moe", str(recipe), "-o", str(out), "-q"]))
            shutil.rmtree(copy, ignore_errors=True)
            copied.append(measured(["cp", "-r", str(out), str(copy)]))
        nbytes = sum(path.stat().st_size for path in out.iterdir())
    over = [one.wall / other.wall for one, other in zip(built, copied, strict=True)]
    rows = [_row(f"moe, {experts} experts", built), _row("cp -r of the mixture", copied)]
    title = f"{experts} models of {size(family.nbytes)}, a mixture of {size(nbytes)}"
    click.echo(Table(title, ["", "wall, s", "processor, s", "peak"], rows).markdown())
    click.echo(f"moe takes {spread(over)} × the copy, median {median(over):.2f} (aim {AIM_OVER_COPY})")


def _row(name: str, runs: list[Run]) -> list[str]:
    cpu = [run.user + run.system for run in runs]
    return [name, spread([run.wall for run in runs]), spread(cpu), size(max(run.peak for run in runs))]


if __name__ == "__main__":
    main()
