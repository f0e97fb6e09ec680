"""Log-probabilities of all responses under a model that doesn't change, computed once and stored: s_ref, and s_t.

Where that is the model that training starts from, the very model that is then trained computes them before its first
step, on its devices. So no second model is in memory, and ρ = 0 where training begins. Any other model computes them
before the one to train is loaded. Each process computes its share of the batches and appends the results to a file of
its own. A resumed run computes what is missing, in the same batches whatever the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from mergekit_lite.answers.loading import free_memory
from mergekit_lite.answers.rows import as_line, read_rows
from mergekit_lite.distillation.recipe.schema import Training
from mergekit_lite.distillation.training.model import frozen_model, layout_of
from mergekit_lite.distillation.training.rows import TrainingRow, laid_out

if TYPE_CHECKING:
    from mergekit_lite.distillation.reporter import Reporter

Compute = Callable[[Sequence[TrainingRow]], list[list[float]]]  # s of each row's responses


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


def filled(
    compute: Compute, rows: Sequence[TrainingRow], size: int, folder: Path, reporter: Reporter
) -> dict[str, tuple[float, ...]]:
    """Return the log-probabilities of all rows by their key: those in ``folder``, and what is computed of others.

    Args:
        compute: of a batch of rows.
        rows: all.
        size: of a batch.
        folder: of the files; its name stands in the progress.
        reporter: tells the progress.
    """
    from accelerate import PartialState

    state = PartialState()
    rank, processes = state.process_index, state.num_processes
    known = stored(folder)
    every = batches(rows, size)
    missing = [batch for batch in every if any(row.key not in known for row in batch)]
    state.wait_for_everyone()  # all processes must read the files before one appends
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        total = sum(map(len, every))
        done = total - sum(map(len, missing))
        with reporter.progress(folder.name, total, done) as advance, appending(folder / f"{rank}.jsonl") as file:
            for start in range(0, len(missing), processes):
                # A model sharded over devices needs all processes in each pass. In the last round, a process without
                # a batch of its own repeats the last one and writes nothing.
                batch = missing[min(start + rank, len(missing) - 1)]
                log_probs = zip(batch, compute(batch), strict=True)
                if start + rank < len(missing):
                    file.write("".join(as_line({"row": row.key, "log_probs": values}) for row, values in log_probs))
                    file.flush()
                advance(sum(map(len, missing[start : start + processes])))
        state.wait_for_everyone()
        known = stored(folder)
    return {row.key: known[row.key] for row in rows}


def filled_by(
    model: str, training: Training, rows: Sequence[TrainingRow], size: int, folder: Path, reporter: Reporter
) -> Mapping[str, Sequence[float]]:
    """Do as ``filled`` under a model that is loaded for it where anything is missing, in the training's dtype.

    Raises:
        CheckpointError: it can't be loaded.
        UsageError: see ``frozen_model``.
    """
    from accelerate import PartialState
    from accelerate.utils import send_to_device

    device = PartialState().device
    loaded: list[Any] = []

    @torch.no_grad()
    def compute(batch: Sequence[TrainingRow]) -> list[list[float]]:
        if not loaded:
            loaded.append(frozen_model(model, training, device))
        dtype = getattr(torch, training.dtype)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            inputs = vars(laid_out(batch, layout_of(loaded[0])))
            sums = loaded[0](**send_to_device(inputs, device))["sums"]
        by_row: list[list[float]] = sums.float().view(len(batch), -1).tolist()
        return by_row

    try:
        return filled(compute, rows, size, folder, reporter)
    finally:
        loaded.clear()
        free_memory()


def appending(path: Path) -> TextIO:
    """Open a file to append lines to, without a torn last one."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8", newline="\n")
