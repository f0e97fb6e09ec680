"""s_ref: the log-probabilities of all responses under the model that training starts from, computed once and kept.

They are taken before the first step from the very model that is then trained, on its devices: no second one is held,
and ρ = 0 where training begins. Each process computes its share of the batches and appends what it finds to a file of
its own; a killed run computes what is missing, in the same batches whatever the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mergekit_lite.answers.rows import as_line, read_rows
from mergekit_lite.distillation.training.rows import Row

if TYPE_CHECKING:
    from mergekit_lite.distillation.reporter import Tell
    from mergekit_lite.distillation.training.trainer import PreferenceTrainer

Batch = Sequence[Row]


def batches(rows: Iterable[Row], size: int) -> list[Batch]:
    """The distinct rows, those of like length together."""
    distinct = {row.key: row for row in rows}
    ordered = sorted(distinct.values(), key=lambda row: (row.longest, row.key))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def known(folder: Path) -> dict[str, tuple[float, ...]]:
    """What was computed, by row key."""
    found: dict[str, tuple[float, ...]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in read_rows(file, []):  # a torn line is computed again
            found[line.row["row"]] = tuple(line.row["log_probs"])
    return found


def fill(trainer: PreferenceTrainer, rows: Sequence[Row], folder: Path, tell: Tell) -> None:
    """Fill the trainer's ``reference``, with its model as it now is.

    Args:
        trainer: about to take its first step, its model on its devices.
        rows: all rows of the stage.
        folder: of the files.
        tell: takes the progress.
    """
    accelerator = trainer.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    have = known(folder)
    every = batches(rows, trainer.args.per_device_train_batch_size)
    missing = [batch for batch in every if any(row.key not in have for row in batch)]
    accelerator.wait_for_everyone()  # all have seen the same
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        count = sum(map(len, every))
        done = count - sum(map(len, missing))
        with tell.progress("reference", count, done) as more, _appending(folder / f"{rank}.jsonl") as file:
            for start in range(0, len(missing), processes):
                # Models spread over devices compute together: who has no batch left goes along with the last one.
                batch = missing[min(start + rank, len(missing) - 1)]
                found = zip(batch, trainer.reference_log_probs(batch), strict=True)
                if start + rank < len(missing):
                    file.write("".join(as_line({"row": row.key, "log_probs": values}) for row, values in found))
                    file.flush()
                more(sum(map(len, missing[start : start + processes])))
        accelerator.wait_for_everyone()
        have = known(folder)
    trainer.reference.update({row.key: have[row.key] for row in rows})


def _appending(path: Path) -> TextIO:
    """The file, to append to, without a torn last line."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")
