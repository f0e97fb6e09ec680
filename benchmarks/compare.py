"""Measure ``compare`` and the linear merge of the same models, a base and two fine-tunes, as whole processes.

python -m benchmarks.compare
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click

from benchmarks.checkpoints import SFT_RMS, Family
from benchmarks.processes import Run, measured
from benchmarks.tables import Table, size, spread

AIM_TIMES, AIM_PEAK = 2.5, 700e6
RECIPE = "merge_method: linear\nmodels: [{models}]\nparameters: {{weight: 1}}\ndtype: bfloat16\n"


@click.command()
@click.option("--parameters", default=1.5e9, show_default=True, help="Of each model.")
@click.option("--runs", default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="For the models; a temporary one by default.")
def main(parameters: float, runs: int, folder: Path | None) -> None:
    """Time both in turns, then compare eight models, and one large tensor, for the memory."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        place = Path(made)
        family = Family(place / "model", ("base", "math", "code"), SFT_RMS, parameters)
        _make(family)
        base, first, second = family.models
        recipe = place / "linear.yml"
        recipe.write_text(RECIPE.format(models=", ".join(f"{{model: {model}}}" for model in (base, first, second))))
        merge = ["merge", str(recipe), "-o", str(place / "merged"), "--force"]
        compare = ["compare", str(base), str(first), str(second)]
        merged, compared = [], []
        for _ in range(runs):
            merged.append(_measured(merge))
            compared.append(_measured(compare))
        eight = _measured(["compare", str(base), *[str(first), str(second)] * 4])
        large = Family(place / "large", ("base", "tuned"), SFT_RMS, 1e9, "tensor")
        _make(large)
        one = _measured(["compare", *map(str, large.models)])
    times = median(run.wall for run in compared) / median(run.wall for run in merged)
    rows = [_row("linear merge of three models", merged), _row("compare a base and two", compared)]
    rows += [_row("compare a base and eight", [eight]), _row("compare a pair, one tensor of 2 GB", [one])]
    click.echo(Table(f"{size(family.nbytes)} a model", ["", "wall, s", "processor, s", "peak"], rows).markdown())
    peak = max(run.peak for run in (*compared, eight, one))
    click.echo(f"compare takes {times:.2f} × the merge (aim {AIM_TIMES}), at most {size(peak)} (aim {size(AIM_PEAK)})")


def _make(family: Family) -> None:
    """In a process of its own, so that this one stays small: a child's peak is never below its parent's."""
    subprocess.run([sys.executable, "-m", "benchmarks.checkpoints", family.as_json()], check=True)


def _measured(arguments: list[str]) -> Run:
    return measured([sys.executable, "-m", "mergekit_lite", *arguments, "-q"])


def _row(name: str, runs: list[Run]) -> list[str]:
    cpu = [run.user + run.system for run in runs]
    return [name, spread([run.wall for run in runs]), spread(cpu), size(max(run.peak for run in runs))]


if __name__ == "__main__":
    main()
