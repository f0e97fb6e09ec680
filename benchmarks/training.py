"""Measure preference training beside TRL's trainer: the same model, rows, steps and machine.

    python -m venv ELSEWHERE && ELSEWHERE/bin/pip install trl
    python -m benchmarks.training --trl ELSEWHERE/bin/python

Both train a new model of SmolLM2-135M's shape by DPO on ragged pairs, one epoch in steps of eight, in float32 on a CPU.
They take turns, each in a process of its own. Loading and writing models is not counted; the reference's
log-probabilities are, and are also shown by themselves. TRL computes them in each step with a second model, or once
before the first (``precompute_ref_log_probs``).

The four ways take some 22 minutes a turn on two cores. Ours beside TRL's faster one takes ten:
``--runs 1 --way ours --way trl-precomputed``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.machine import this_machine
from benchmarks.tables import Table, publish, size, spread
from benchmarks.training_alone import BATCH

VOCABULARY = 49_152
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
PROMPT, ANSWER = (20, 100), (8, 200)  # tokens, least and most
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {  # by whom, and with which keys
    "ours": ("ours", ()),
    "ours-padded": ("ours", ("packing=false",)),
    "trl": ("trl", ()),
    "trl-precomputed": ("trl", ("precompute_ref_log_probs=true",)),
}
ROWS = {"ours": "per_device_batch_size", "trl": "per_device_train_batch_size"}


@click.command()
@click.option("--trl", type=click.Path(exists=True, path_type=Path), help="The Python of an environment with TRL.")
@click.option("--pairs", default=110, show_default=True, help="Rows to train on.")
@click.option("--layers", default=SHAPE["num_hidden_layers"], show_default=True, help="Of the model.")
@click.option("--rows", "per_device", default=2, show_default=True, help="Rows on the device at once.")
@click.option("--way", "chosen", type=click.Choice(list(WAYS)), multiple=True, help="Only these; with --trl all.")
@click.option("--runs", type=click.IntRange(1), default=2, show_default=True, help="Turns.")
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Of each process.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(__file__).parent / "out", help="For results.")
def main(
    trl: Path | None,
    pairs: int,
    layers: int,
    per_device: int,
    chosen: tuple[str, ...],
    runs: int,
    threads: int,
    folder: Path,
) -> None:
    """Measure, and print a table."""
    pythons = {"ours": Path(sys.executable), "trl": trl}
    names = chosen or [name for name, (by, _) in WAYS.items() if pythons[by]]
    if missing := [name for name in names if pythons[WAYS[name][0]] is None]:
        raise click.UsageError(f"{', '.join(missing)}: --trl is missing, the Python of an environment with TRL.")
    made = folder / "training"
    tokens = make(made, pairs, layers)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(runs):
        for name in names:
            by, keys = WAYS[name]
            turns[name].append(took(str(pythons[by]), by, made, (f"{ROWS[by]}={per_device}", *keys), threads))
            total, step = (sum(cpu(turns[name][-1], what)) for what in ("reference", "train"))
            click.echo(f"  {number + 1}, {name}: {total:.1f} + {step:.1f} s of processor time", err=True)
    columns = (
        "",
        "wall, s a step",
        "CPU, s a step",
        "of it reference",
        "tokens a second of CPU",
        "peak memory",
        "loss",
    )
    rows = [row(name, results, tokens) for name, results in turns.items()]
    apart = max(
        abs(a - b) for results in turns.values() for a, b in zip(results[0]["losses"], first(turns), strict=True)
    )
    notes = [
        f"Measured on {this_machine()}; {threads} threads; load {', '.join(f'{x:.1f}' for x in os.getloadavg())}.",
        f"{pairs} pairs, {tokens:,} tokens, of which each answer has its prompt; {per_device} rows at once.",
        f"Losses of all steps and ways differ by {apart:.1e} at most.",
    ]
    title = f"DPO, float32, steps of {BATCH} pairs: medians of {runs} (range)"
    publish(folder, "training", "# Training", [Table(title, columns, rows)], notes, {"turns": turns})


def make(folder: Path, pairs: int, layers: int) -> int:
    """Make model, tokenizer and rows; return the number of tokens of an epoch, each answer with its prompt."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from mergekit_lite.distillation.training.rows import order

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "ours" / "pairs").mkdir(parents=True)
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
    words = special + [f"w{number}" for number in range(VOCABULARY - len(special))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})).save_pretrained(folder / "model")

    draws = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{draws.randrange(VOCABULARY - len(special))}" for _ in range(draws.randint(least, most)))

    rows, told, tokens = [], [], 0
    for number in range(pairs):
        prompt, chosen, rejected = text(*PROMPT), text(*ANSWER), text(*ANSWER)
        said = [{"role": "user", "content": prompt}]
        answers = {"chosen": chosen, "rejected": rejected}
        told.append({"prompt": str(number), "domain": "", "messages": said})
        told[-1] |= {key: [{"text": each, "role": "source"}] for key, each in answers.items()}
        rows.append({"prompt": said} | {k: [{"role": "assistant", "content": v}] for k, v in answers.items()})
    seen = order(pairs, pairs // BATCH * BATCH, 0, "preference")
    for place in seen:
        words_of = [len(turn[0]["content"].split()) for turn in rows[place].values()]
        tokens += 2 * (words_of[0] + 5) + words_of[1] + words_of[2] + 2
    (folder / "ours" / "pairs" / "preference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    (folder / "in-order.jsonl").write_text("".join(json.dumps(rows[place]) + "\n" for place in seen))
    return tokens


def took(python: str, by: str, folder: Path, keys: Sequence[str], threads: int) -> dict[str, Any]:
    """Train in a process of its own."""
    shutil.rmtree(folder / "ours" / "train", ignore_errors=True)
    result = folder / "took.json"
    command = [python, "-m", "benchmarks.training_alone", by, str(folder), str(result), *keys]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def first(turns: Mapping[str, list[dict[str, Any]]]) -> list[float]:
    """Return the losses that all others are held to."""
    losses: list[float] = next(iter(turns.values()))[0]["losses"]
    return losses


def cpu(result: Mapping[str, Any], what: str, kind: int = 1) -> list[float]:
    """Return the seconds of each part of the work, of processor time or (0) of wall time."""
    return [seconds[kind] for seconds in result["seconds"].get(what, [])]


def row(name: str, results: Sequence[Mapping[str, Any]], tokens: int) -> list[str]:
    """Return a row of the table."""
    steps = len(cpu(results[0], "train"))
    wall, busy = (
        [sum(cpu(result, "train", kind) + cpu(result, "reference", kind)) for result in results] for kind in (0, 1)
    )
    alone = [sum(cpu(result, "reference")) / steps for result in results]
    return [
        name,
        spread([each / steps for each in wall]),
        spread([each / steps for each in busy]),
        spread(alone) if any(alone) else "in each step",
        f"{tokens / median(busy):,.0f}",
        size(median(result["peak"] for result in results)),
        f"{results[0]['losses'][-1]:.4f}",
    ]


if __name__ == "__main__":
    main()
