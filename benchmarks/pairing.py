"""Measure the stage ``pair``: 100,000 scored answers of 1.7 kB to 20,000 prompts, as a whole process.

python -m benchmarks.pairing
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.processes import measured
from benchmarks.tables import size
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.distillation.folder import Folder

SOURCES = ("a", "b", "c", "d", "e")
LENGTH = 1700  # characters of an answer


def recipe(folder: Path) -> dict[str, Any]:
    """Return a recipe whose first two stages are done."""
    source = {"server": "http://localhost/v1", "samples": 1}
    return {
        "folder": str(folder / "made"),
        "target": "target",
        "prompts": [{"path": "prompts.jsonl"}],
        "sources": [{"name": name, "model": name, **source} for name in SOURCES],
        "scorers": [{"name": "reward", "kind": "reward", "model": "rm"}],
        "pairs": {"rule": "best_worst", "score": "reward", "sft_share": 0.4},
        "train": {"sft": {"learning_rate": 1e-5}, "preference": {"objective": "dpo", "learning_rate": 1e-6}},
    }


def make(folder: Path, prompts: int) -> Path:
    """Write the files of the stages before; return the recipe."""
    made, draws = Folder(folder / "made"), random.Random(0)
    (folder / "prompts.jsonl").touch()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    keys = [f"p{number}" for number in range(prompts)]
    common = {"domain": "", "reference": None, "tests": []}
    write_rows(
        made.prompts,
        ({"id": key, "messages": [{"role": "user", "content": f"Question {key}?"}], **common} for key in keys),
    )
    for source in SOURCES:
        write_rows(made.samples(source), answers(source, keys, draws))
        scores = ({"prompt": key, "index": 0, "score": round(draws.random(), 4), "why": ""} for key in keys)
        write_rows(made.scores("reward", source), scores)
    return folder / "recipe.yaml"


def answers(source: str, keys: list[str], draws: random.Random) -> Iterator[dict[str, Any]]:
    """Yield an answer to each prompt; no two are alike."""
    for key in keys:
        text = f"{source} {key} {draws.getrandbits(4 * LENGTH):x}"[:LENGTH]
        yield {"prompt": key, "source": source, "index": 0, "text": text, "finish": "stop", "tokens": LENGTH // 4}


@click.command()
@click.option("--prompts", default=20_000, show_default=True, help="Each with five answers.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="The best of them counts.")
def main(prompts: int, runs: int) -> None:
    """Measure, and print."""
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder), prompts)
        command = [sys.executable, "-m", "mergekit_lite", "distill", "pair", str(made)]
        took = min((measured(command) for _ in range(runs)), key=lambda run: run.user + run.system)
        count = sum(1 for name in ("sft", "preference") for _ in Folder(Path(folder) / "made").pairs(name).open())
    click.echo(
        f"{prompts * len(SOURCES):,} answers, {count:,} rows: {took.wall:.1f} s, {took.user + took.system:.1f} s of "
        f"processor time, {size(took.peak)}"
    )


if __name__ == "__main__":
    main()
