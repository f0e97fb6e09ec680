"""Measure a step of distillation beside a plain step of SFT on the same rows: the same model, positions and machine.

    python -m benchmarks.fusing                          # both shapes, all distances
    python -m benchmarks.fusing --shape wide --way alm --way p_kl

A step is the forward and the backward pass over two rows, without the optimiser, which is the same for all. The
teacher's K = 128 likeliest tokens of each position are random, as are the weights: what is said changes no time. Across
vocabularies, some tokens of the one are two of the other. The ways take turns, each in a process of its own, and are
compared by processor time; one thread by default, as threads that wait for others burn it.

``smollm2`` is SmolLM2-135M's shape. ``wide`` is the worst case: a small body under a large vocabulary, so that what a
distance does to logits weighs most.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from benchmarks.machine import this_machine
from benchmarks.tables import Table, publish, size, spread

if TYPE_CHECKING:
    from mergekit_lite.distillation.objectives.targets import Targets

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
    "wide": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 131_072,
    },
}
TEACHER = 151_936  # tokens of another vocabulary
PROMPT, ANSWER = 50, 200  # tokens of each of two rows
TOP = 128
STEPS = 3
PLAIN = "sft"


@click.command()
@click.option("--shape", "shapes", type=click.Choice(list(SHAPES)), multiple=True, help="Only these models.")
@click.option("--way", "chosen", multiple=True, help="Only these distances.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Turns.")
@click.option("--threads", default=1, show_default=True, help="Of each process.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(__file__).parent / "out", help="For results.")
@click.option("--alone", nargs=2, hidden=True, help="A shape and a way: measure only that, in this process.")
def main(
    shapes: Sequence[str],
    chosen: Sequence[str],
    dtype: str,
    runs: int,
    threads: int,
    folder: Path,
    alone: tuple[str, str] | None,
) -> None:
    """Measure, and print a table."""
    if alone is not None:
        click.echo(json.dumps(measured(*alone, dtype)))
        return
    from mergekit_lite.distillation.objectives.distances import DISTANCES

    folder.mkdir(parents=True, exist_ok=True)
    if unknown := [way for way in chosen if way not in (PLAIN, *DISTANCES)]:
        raise click.BadParameter(f"There is no distance {unknown[0]!r}. There are: {', '.join(DISTANCES)}.")
    ways = list(dict.fromkeys([PLAIN, *(chosen or DISTANCES)]))
    turns: dict[str, dict[str, list[dict[str, Any]]]] = {shape: {way: [] for way in ways} for shape in shapes or SHAPES}
    for _ in range(runs):
        for shape, taken in turns.items():
            for way in ways:
                taken[way].append(took(shape, way, dtype, threads))
                click.echo(f"  {shape} {way}: {median(taken[way][-1]['seconds']):.2f} s", err=True)
    columns = ("", "processor time of a step, s", f"× {PLAIN}", "peak memory")
    tables = [
        Table(f"{shape}: medians of {runs} turns (range)", columns, rows(taken)) for shape, taken in turns.items()
    ]
    notes = [f"Measured on {this_machine()}; {threads} thread(s), {dtype}, {2 * ANSWER} scored tokens, K = {TOP}."]
    publish(folder, "fusing", "# Distillation beside SFT", tables, notes, {"turns": turns})


def rows(taken: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """A row for each way; ratios are those of the same turn."""
    times = {way: [median(each["seconds"]) for each in results] for way, results in taken.items()}
    return [
        [
            way,
            spread(times[way], 2),
            f"{median(mine / plain for mine, plain in zip(times[way], times[PLAIN], strict=True)):.2f}",
            size(median(each["peak"] for each in results)),
        ]
        for way, results in taken.items()
    ]


def took(shape: str, way: str, dtype: str, threads: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fusing", "--dtype", dtype, "--alone", shape, way]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measured(shape: str, way: str, dtype: str) -> dict[str, Any]:
    """Take some steps; the first one, which warms up, isn't counted."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mergekit_lite.answers.logprobs import padded, response_log_probs
    from mergekit_lite.answers.template import Tokens
    from mergekit_lite.distillation.objectives.distances import DISTANCES
    from mergekit_lite.distillation.training.distances import distance_losses

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=8192)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    vocabulary = config.vocab_size
    ids = torch.randint(vocabulary, (2, PROMPT + ANSWER)).tolist()
    batch = padded([Tokens(tuple(row[:PROMPT]), tuple(row[PROMPT:])) for row in ids])
    distance = DISTANCES.get(way)
    if distance is not None:
        cross = distance.vocabulary != "same"
        targets = teacher(TEACHER if cross else vocabulary, cross)
        between = related(distance.vocabulary, vocabulary)

    def step() -> None:
        if distance is None:
            scored = response_log_probs(model, batch)
            loss = -scored.sums.sum() / scored.lengths.sum()
        else:
            log_probs, (losses,) = distance_losses(model, batch, [targets], distance, distance.defaults, [between])
            loss = -0.9 * log_probs.mean() + 0.1 * losses.mean()
        loss.backward()
        model.zero_grad()

    seconds = []
    for _ in range(1 + STEPS):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds[1:], "peak": peak}


def teacher(vocabulary: int, cross: bool) -> Targets:
    """Return random targets; across vocabularies every fourth group has two tokens on one side."""
    import torch

    from mergekit_lite.distillation.objectives.targets import Targets

    shapes = [((1, 1), (1, 2), (1, 1), (2, 1))[place % 4] if cross else (1, 1) for place in range(2 * ANSWER)]
    mine, theirs = (
        torch.cat([torch.full((shape[side],), place) for place, shape in enumerate(shapes)]) for side in (0, 1)
    )
    mine = mine[: 2 * ANSWER]
    groups = int(mine[-1]) + 1
    theirs = theirs[theirs < groups]
    scores = torch.randn(len(theirs), TOP).mul(2).sort(descending=True).values
    log_probs = scores.log_softmax(1) + torch.tensor(0.95).log()
    # Some tokens are likely everywhere, so that positions share columns as those of a text do.
    ids = torch.stack([torch.randperm(vocabulary // (1 if place % 2 else 16))[:TOP] for place in range(len(theirs))])
    return Targets(mine, theirs, ids[:, 0], log_probs[:, 0], ids, log_probs, groups)


def related(kind: str, vocabulary: int) -> Any:
    """Return a map of two thirds of the teacher's tokens, or a projection of two entries a row, or nothing."""
    import numpy as np

    from mergekit_lite.distillation.alignment.vocabulary import Projection, VocabularyMap

    draws = np.random.default_rng(0)
    if kind == "map":
        own = np.full(TEACHER, -1, np.int32)
        both = min(vocabulary, TEACHER) * 2 // 3
        own[draws.permutation(TEACHER)[:both]] = draws.permutation(vocabulary)[:both]
        return VocabularyMap(own)
    if kind == "projection":
        ids = np.full((vocabulary, 4), -1, np.int32)
        ids[:, :2] = draws.integers(TEACHER, size=(vocabulary, 2))
        weights = np.zeros((vocabulary, 4), np.float32)
        weights[:, :2] = 0.9, 0.1
        return Projection(ids, weights, TEACHER)
    return None


if __name__ == "__main__":
    main()
