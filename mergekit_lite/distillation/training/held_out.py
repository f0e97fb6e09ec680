"""Prompts held out of a training, and the choice among its last checkpoints by how these do on them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_lite.answers.rows import seed_of
from mergekit_lite.distillation.recipe.schema import Training
from mergekit_lite.distillation.training.rows import TrainingRow
from mergekit_lite.errors import UsageError, counted

LOSS, ACCURACY, MARGIN = "eval_loss", "eval_accuracy", "eval_margin"  # in the log
NAMES = {LOSS: "loss", ACCURACY: "accuracy", MARGIN: "margin"}


class Split(NamedTuple):
    """The rows to train on, and those held out. No prompt has rows in both."""

    trained: list[TrainingRow]
    held: list[TrainingRow]
    prompts: int  # held out


def split(rows: Sequence[TrainingRow], training: Training, seed: int, stage: str) -> Split:
    """Draw the prompts that a training holds out. Seed, stage and prompts decide, not the order of the rows.

    Raises:
        UsageError: there are too few prompts for both parts.
    """
    if not training.eval:
        return Split(list(rows), [], 0)
    # A prompt may be cut in one row and not in another, so what is left of a cut one tells it apart.
    kept = training.max_prompt_length or training.max_length // 2
    keys = [row.prompt[-kept:].tobytes() for row in rows]
    prompts = sorted(set(keys), key=lambda key: (seed_of(seed, "eval", stage, key.hex()), key))
    number = int(training.eval) if training.eval >= 1 else math.floor(training.eval * len(prompts) + 1e-9)
    if not 0 < number < len(prompts):
        raise UsageError(
            f"train.{stage}: eval {training.eval:g} holds {number:,} of {counted(len(prompts), 'prompt')} out. "
            f"Name a share or number that leaves prompts in both parts, 1 to {len(prompts) - 1:,}, or 0 for none."
        )
    drawn = set(prompts[:number])
    trained = [row for row, key in zip(rows, keys, strict=True) if key not in drawn]
    return Split(trained, [row for row, key in zip(rows, keys, strict=True) if key in drawn], number)


class Choice(NamedTuple):
    """The checkpoint to publish, and by which figures of which checkpoints it was chosen."""

    step: int
    by: str  # LOSS or ACCURACY
    figures: Mapping[int, float]  # by step

    @property
    def told(self) -> str:
        """The choice in words."""
        others = ", ".join(f"step {step:,}: {value:.4g}" for step, value in self.figures.items() if step != self.step)
        what = f"{'highest' if self.by == ACCURACY else 'least'} held-out {NAMES[self.by]}"
        return f"step {self.step:,} has the {what} ({self.figures[self.step]:.4g}; {others or 'no other was kept'})"


def choose(log: Path, steps: Iterable[int]) -> Choice:
    """Choose among the checkpoints of some steps by the rows of a log: by accuracy where it has one, then by loss.

    Of equals the later step is taken.
    """
    measured: dict[int, Mapping[str, float]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if LOSS in row:
            measured[row["step"]] = row
    found = {step: measured[step] for step in sorted(steps) if step in measured}
    best = max(found, key=lambda step: (found[step].get(ACCURACY, 0.0), -found[step][LOSS], step))
    by = ACCURACY if ACCURACY in found[best] else LOSS
    return Choice(best, by, {step: row[by] for step, row in found.items()})


def told(figures: Mapping[str, float]) -> str:
    """Return held-out figures in words: ``held-out loss 0.52, accuracy 0.75``."""
    return "held-out " + ", ".join(f"{NAMES[key]} {value:.4g}" for key, value in figures.items() if key in NAMES)
