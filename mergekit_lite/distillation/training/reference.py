"""s_ref: the log-probabilities of all responses under the model that training starts from, computed once and stored.

The very model that is then trained computes them before its first step, on its devices. So no second model is in
memory, and ρ = 0 where training begins. Each process computes its share of the batches and appends the results to a
file of its own. A resumed run computes what is missing, in the same batches whatever the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mergekit_lite.answers.rows import as_line, read_rows
from mergekit_lite.distillation.training.rows import TrainingRow

if TYPE_CHECKING:
    from mergekit_lite.distillation.reporter import Reporter
    from mergekit_lite.distillation.training.trainer import PreferenceTrainer


def batches(rows: Iterable[TrainingRow], size: int) -> list[Sequence[TrainingRow]]:
    """Return the distinct rows in batches of like length."""
    distinct = {row.key: row for row in rows}
    ordered = sorted(distinct.values(), key=lambda row: (row.longest, row.key))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def stored(folder: Path) -> dict[str, tuple[float, ...]]:
    """Return the log-probabilities that earlier runs computed, by row key."""
    log_probs: dict[str, tuple[float, ...]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in read_rows(file, []):  # a torn line is a problem of no interest: its row is computed again
            log_probs[line.row["row"]] = tuple(line.row["log_probs"])
    return log_probs


def fill(trainer: PreferenceTrainer, rows: Sequence[TrainingRow], folder: Path, reporter: Reporter) -> None:
    """Fill the trainer's ``reference`` with log-probabilities of all rows under its model as it is now.

    The trainer is before its first step, its model on its devices. Files are in ``folder``.
    """
    accelerator = trainer.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    known = stored(folder)
    every = batches(rows, trainer.args.per_device_train_batch_size)
    missing = [batch for batch in every if any(row.key not in known for row in batch)]
    accelerator.wait_for_everyone()  # all processes must read the files before one appends
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        total = sum(map(len, every))
        done = total - sum(map(len, missing))
        with reporter.progress("reference", total, done) as advance, appending(folder / f"{rank}.jsonl") as file:
            for start in range(0, len(missing), processes):
                # A model sharded over devices needs all processes in each pass. In the last round, a process without
                # a batch of its own repeats the last one and writes nothing.
                batch = missing[min(start + rank, len(missing) - 1)]
                log_probs = zip(batch, trainer.reference_log_probs(batch), strict=True)
                if start + rank < len(missing):
                    file.write("".join(as_line({"row": row.key, "log_probs": values}) for row, values in log_probs))
                    file.flush()
                advance(sum(map(len, missing[start : start + processes])))
        accelerator.wait_for_everyone()
        known = stored(folder)
    trainer.reference.update({row.key: known[row.key] for row in rows})


def appending(path: Path) -> TextIO:
    """Open a file to append lines to, without a torn last one."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8", newline="\n")
