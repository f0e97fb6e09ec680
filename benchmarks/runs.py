"""A run's checkpoints and adapters, against the project's aims, on inputs that need 5 GB of disk at a time.

    python -m benchmarks.runs [--runs 5] [--only relex,core,average] [--folder DIR] [--quick]

relex    RELEX of four checkpoints beside the linear merge of the same four, in turns: at most 1.6 times as long
core     TIES in the core space of eight adapters of rank 32 of a Llama 2 7B, all linear layers: under 30 s on two cores
average  ``schedule_average`` of 50 checkpoints of 3 GB: in at most 300 MB of memory. Their files are holes behind their
         headers, which read as zeros: no disk holds them, and the time says nothing of a disk

Commands are measured as whole processes. Files are read once before anything is measured, so that the linear merge has
them in memory as RELEX has.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

import click

from benchmarks.checkpoints import DPO_RMS, Family
from benchmarks.machine import this_machine
from benchmarks.processes import Run, measured
from benchmarks.tables import Table, publish, size, spread
from mergekit_lite.layout import OutputTensor, grouped_by_size, index_json, safetensors_layout, shard_names

STEPS = (25, 50, 75, 100)
HIDDEN, MLP, LAYERS = 4096, 11008, 32  # of Llama 2 7B
ADAPTERS, RANK = 8, 32
CHECKPOINTS = 50
MAKE_ADAPTERS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
folder, adapters, rank, hidden, mlp, layers = Path(sys.argv[1]), *map(int, sys.argv[2:])
sizes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
sizes |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
for number in range(adapters):
    torch.manual_seed(number)
    tensors = {}
    for layer in range(layers):
        for name, (outputs, inputs) in sizes.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = (0.02 * torch.randn(rank, inputs)).bfloat16()
            tensors[f"{module}.lora_B.weight"] = (0.02 * torch.randn(outputs, rank)).bfloat16()
    path = folder / f"adapter-{number}"
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    modules = sorted({name.split(".")[1] for name in sizes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
"""


@click.command()
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Of each command that is timed.")
@click.option("--only", default="relex,core,average", show_default=True, help="What is measured.")
@click.option("--folder", type=click.Path(path_type=Path), help="For inputs and outputs; by default a temporary one.")
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/out", show_default=True)
@click.option("--quick", is_flag=True, help="Everything small: shows that it runs, nothing else.")
def main(runs: int, only: str, folder: Path | None, out: Path, quick: bool) -> None:
    """Measure commands on runs and adapters, and hold them to the project's aims."""
    parts: Mapping[str, Callable[[Path, int, bool], tuple[Table, list[Run]]]] = {
        "relex": relex,
        "core": core,
        "average": average,
    }
    if unknown := set(only.split(",")) - parts.keys():
        raise click.UsageError(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(parts)}.")
    tables, figures = [], {}
    for name in only.split(","):
        click.echo(f"{name} …", err=True)
        with scratch(folder) as place:
            table, taken = parts[name](place, runs, quick)
        tables.append(table)
        figures[name] = [asdict(run) for run in taken]
    machine = this_machine()
    out.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine.as_data(), "runs": figures}
    publish(out, "runs", f"# Runs and adapters\n\n{machine}", tables, notes(figures), data)


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """Make a folder, and remove it in the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        yield Path(place)


def notes(figures: Mapping[str, Sequence[Mapping[str, float | None]]]) -> list[str]:
    """Say how busy the machine was otherwise: times of a busy one are worth nothing."""
    others = [run["others"] for runs in figures.values() for run in runs if run["others"] is not None]
    return [f"Everything else kept up to {max(others):.1f} cores busy meanwhile."] if others else []


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "mergekit_lite", *map(str, words)]


def relex(place: Path, runs: int, quick: bool) -> tuple[Table, list[Run]]:
    """Measure RELEX and the linear merge of the same checkpoints in turns, after one of each that is not counted."""
    names = ("base", *(f"step-{step}" for step in STEPS))
    family = Family(place / "run", names, DPO_RMS, 4e7 if quick else 3.5e8)
    # by a process of its own: with torch in this one, no command could be measured below it
    measured([sys.executable, "-m", "benchmarks.checkpoints", family.as_json()])
    base, *checkpoints = map(str, family.models)
    linear = {"merge_method": "linear", "models": [{"model": each} for each in checkpoints]}
    followed = {"merge_method": "relex", "base_model": base, "parameters": {"to_step": 500}} | {
        "models": [{"model": each, "parameters": {"step": step}} for each, step in zip(checkpoints, STEPS, strict=True)]
    }
    recipes = {"linear": linear | {"parameters": {"weight": 1.0}}, "relex": followed}
    taken: dict[str, list[Run]] = {name: [] for name in recipes}
    for turn in range(runs + 1):
        for name, recipe in recipes.items():
            (place / f"{name}.yml").write_text(json.dumps(recipe))
            run = measured(command("merge", place / f"{name}.yml", "-o", place / "out", "--force", "--quiet"))
            shutil.rmtree(place / "out")
            if turn:
                taken[name].append(run)
    pairs = list(zip(taken["linear"], taken["relex"], strict=True))
    rows = [[name, *row(taken[name])] for name in recipes]
    walls, used = ([f(b) / f(a) for a, b in pairs] for f in (wall, processor))
    rows.append(["relex / linear, aim 1.6", spread(walls), spread(used), ""])
    rows.append(["the aim is met", "yes" if median(walls) <= 1.6 else "NO", "", ""])
    title = f"RELEX of {len(STEPS)} checkpoints of {size(family.nbytes)}, and their linear merge"
    return Table(title, HEADS, rows), [run for pair in pairs for run in pair]


def core(place: Path, runs: int, quick: bool) -> tuple[Table, list[Run]]:
    """Measure TIES in the core space; the result has the rank of all adapters together."""
    dimensions = (ADAPTERS, RANK, HIDDEN // 16, MLP // 16, 2) if quick else (ADAPTERS, RANK, HIDDEN, MLP, LAYERS)
    measured([sys.executable, "-c", MAKE_ADAPTERS, str(place), *map(str, dimensions)])
    adapters = sorted(place.glob("adapter-*"))
    words = command("vector", "combine", "--space", "core", "--method", "ties", "-p", "density=0.5", *adapters)
    taken = []
    for _ in range(runs):
        taken.append(measured([*words, "-o", str(place / "out"), "--quiet"]))
        shutil.rmtree(place / "out")
    rows = [["ties", *row(taken)]]
    rows.append(["under 30 s", "yes" if median(map(wall, taken)) < 30 else "NO", "", ""])
    return Table(f"The core space of {ADAPTERS} adapters of rank {RANK}, {dimensions[-1]} layers", HEADS, rows), taken


def average(place: Path, runs: int, quick: bool) -> tuple[Table, list[Run]]:
    """Measure the memory of an average over many checkpoints, once."""
    shapes = Family(place, (), 0, 4e7 if quick else 1.5e9).shapes
    tensors = [OutputTensor(name, "bfloat16", shape) for name, shape in shapes.items()]
    for number in range(CHECKPOINTS):
        write_holes(place / f"run/step-{number + 1}", tensors)
    recipe = {"merge_method": "schedule_average", "models": [{"run": str(place / "run/step-*")}]}
    (place / "average.yml").write_text(json.dumps(recipe | {"parameters": {"schedule": "cosine"}}))
    taken = [measured(command("merge", place / "average.yml", "-o", place / "out", "--quiet"))]
    rows = [["schedule_average", *row(taken)]]
    rows.append(["in at most 300 MB", "", "", "yes" if taken[0].peak <= 300e6 else "NO"])
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Table(f"An average of {CHECKPOINTS} checkpoints of {size(nbytes)}, files of holes", HEADS, rows), taken


def write_holes(folder: Path, tensors: Sequence[OutputTensor]) -> None:
    """Write a model whose files are holes behind their headers."""
    groups = grouped_by_size(tensors, 1 << 30)
    layout = safetensors_layout(groups, shard_names(len(groups)))
    folder.mkdir(parents=True)
    for shard in layout.files:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    if len(layout.files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(layout.files)))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


HEADS = ("", "seconds", "of processor time", "most memory")


def wall(run: Run) -> float:
    return run.wall


def processor(run: Run) -> float:
    return run.user + run.system


def row(taken: Sequence[Run]) -> list[str]:
    """Return the cells of a command that was measured some times."""
    return [spread([*map(wall, taken)]), spread([*map(processor, taken)]), size(max(run.peak for run in taken))]


if __name__ == "__main__":
    main()
