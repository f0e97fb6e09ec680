"""Measure two vocabularies in one order: a linear merge of two embeddings whose tokens stand elsewhere, beside ``cp``.

    python -m benchmarks.vocabularies [--tokens 152064] [--width 4096] [--runs 3] [--folder DIR]

The second model has the tokens of the first in a random order, and other padding. Commands take turns; both models are
copied, as both are read. Memory is that of all processes together.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.processes import Run, measured
from benchmarks.tables import Table, size, spread

AIM_TIMES, AIM_PEAK = 2.0, 300e6
PADDING = 399  # rows behind the tokens: 151,665 of 152,064, as Qwen2.5's
FEWER = 256  # rows of padding that the second model lacks
BLOCK = 1024  # rows written at once: this process stays small, as no child's peak is measured below its own
RECIPE = """merge_method: linear
models: [{{model: {0}, parameters: {{weight: 0.5}}}}, {{model: {1}, parameters: {{weight: 0.5}}}}]
tokenizer: {{source: {0}, width: max}}
"""
NAME = "model.embed_tokens.weight"


@click.command()
@click.option("--tokens", "rows", default=152_064, show_default=True, help="Rows of the first model's vocabulary.")
@click.option("--width", default=4096, show_default=True, help="Elements of a row.")
@click.option("--runs", default=3, show_default=True)
@click.option("--in-order", is_flag=True, help="Leave the tokens in their order: only the padding differs.")
@click.option("--folder", type=click.Path(path_type=Path), help="For the models; a temporary one by default.")
def main(rows: int, width: int, runs: int, in_order: bool, folder: Path | None) -> None:
    """Time both in turns."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        place = Path(made)
        tokens = [f"token {number}" for number in range(rows - PADDING)]
        other = tokens if in_order else random.Random(0).sample(tokens, len(tokens))
        models = [_model(place / "one", rows, width, tokens), _model(place / "two", rows - FEWER, width, other)]
        recipe = place / "aligned.yml"
        recipe.write_text(RECIPE.format(*models))
        out = place / "out"
        merge = [sys.executable, "-m", "mergekit_lite", "merge", str(recipe), "-o", str(out), "--force", "-q"]
        copied, merged = [], []
        for _ in range(runs):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            copied.append(measured(["cp", "-r", *map(str, models), str(out)]))
            shutil.rmtree(out)
            merged.append(measured(merge))
    rows_of_table = [_row("cp -r of both", copied), _row("linear merge in one order", merged)]
    title = f"two vocabularies of {rows:,} × {width:,} in bfloat16, {size(2 * rows * width)} each"
    heads = ["", "wall, s", "processor, s", "others, cores", "peak"]
    click.echo(Table(title, heads, rows_of_table).markdown())
    times = median(run.wall for run in merged) / median(run.wall for run in copied)
    peak = max(run.peak for run in merged)
    click.echo(f"the merge takes {times:.2f} × the copies (aim {AIM_TIMES:g}), {size(peak)} (aim {size(AIM_PEAK)})")


def _model(folder: Path, rows: int, width: int, tokens: list[str]) -> Path:
    """Write a model that is an embedding of noise, with its config and tokenizer."""
    folder.mkdir()
    header = {NAME: {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, 2 * rows * width]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(rows)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for first in range(0, rows, BLOCK):
            values = draw.standard_normal((min(BLOCK, rows - first), width), np.float32)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).data)
    config = {"model_type": "llama", "hidden_size": width, "vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": vocabulary, "added_tokens": []}))
    return folder


def _row(name: str, runs: list[Run]) -> list[str]:
    cpu = [run.user + run.system for run in runs]
    others = median(run.others or 0.0 for run in runs)
    return [name, spread([run.wall for run in runs]), spread(cpu), f"{others:.1f}", size(max(run.peak for run in runs))]


if __name__ == "__main__":
    main()
