"""Measure planning: a recipe for three models of 45,000 tensors, as a whole process, with only headers on the disk.

python -m benchmarks.plan
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.processes import measured
from mergekit_lite.layout import OutputTensor, grouped_by_size, index_json, safetensors_layout, shard_names

LAYERS, EXPERTS = 61, 245  # of three matrices each, as in the largest mixtures of experts
RECIPE = """\
merge_method: ties
base_model: {0}/base
models:
  - model: {0}/math
    parameters:
      weight: [0.2, 0.8]
      density: [{{filter: mlp, value: [0.3, 0.7]}}, {{value: 0.5}}]
  - model: {0}/code
    parameters: {{weight: 0.5, density: 0.5}}
dtype: bfloat16
"""


def tensors() -> list[OutputTensor]:
    """Return the tensors of one model; they are small, as only their number matters."""
    names = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(LAYERS) for p in "qkvo"]
    names += [
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj.weight"
        for n in range(LAYERS)
        for e in range(EXPERTS)
        for p in ("gate", "up", "down")
    ]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return [OutputTensor(name, "bfloat16", (32, 64)) for name in names]


def make(folder: Path, shards: int = 10) -> None:
    """Write a model whose files are holes behind their headers."""
    made = tensors()
    groups = grouped_by_size(made, sum(tensor.nbytes for tensor in made) // shards)
    layout = safetensors_layout(groups, shard_names(len(groups)))
    folder.mkdir()
    for shard in layout.files:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(layout.files)))
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "num_hidden_layers": LAYERS}))


def prepare(folder: Path) -> Path:
    """Write three models and a recipe for them; the recipe."""
    for name in ("base", "math", "code"):
        make(folder / name)
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE.format(folder))
    return recipe


@click.command()
@click.option("--runs", default=3, show_default=True, help="The fastest one counts.")
def main(runs: int) -> None:
    """Time ``mergekit-lite plan``, and a process that imports torch and does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(Path(folder))
        commands = {"plan": ["-m", "mergekit_lite", "plan", str(recipe)], "import torch": ["-c", "import torch"]}
        for name, command in commands.items():
            best = min(
                (measured([sys.executable, *command]) for _ in range(runs)), key=lambda run: run.user + run.system
            )
            cpu, peak = best.user + best.system, best.peak / 1e6
            click.echo(f"{name:<12}  3 × {len(tensors()):,} tensors  {cpu:.2f} s of processor time, {peak:.0f} MB")


if __name__ == "__main__":
    main()
