"""transformers' trainer with the losses of this package. Imported only for training, as transformers loads slowly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mergekit_lite.answers.logprobs import Batch
from mergekit_lite.answers.packing import Packed
from mergekit_lite.distillation.training import held_out
from mergekit_lite.distillation.training.model import layout_of
from mergekit_lite.distillation.training.rows import TrainingRow, laid_out
from mergekit_lite.distillation.training.watch import DivergedError, Watch, check_weights

Inputs = dict[str, Any]
MODEL_INPUTS = tuple(dict.fromkeys(field.name for kind in (Batch, Packed) for field in fields(kind)))
NO_LABEL = -100  # transformers' label of tokens without loss


class OrderedRows(Dataset[TrainingRow]):
    """The rows in the order in which training sees them."""

    def __init__(self, rows: Sequence[TrainingRow], order: Sequence[int]):
        self.rows = rows
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> TrainingRow:
        return self.rows[self.order[position]]

    def group(self, step: int) -> None:
        """Put rows of like length side by side within each optimiser step of ``step`` rows, the longest first.

        So the parts of a step need little padding, and processes wait little for each other. What a step learns from
        stays the same.
        """
        starts = range(0, len(self.order), step)
        steps = (sorted(self.order[start : start + step], key=lambda at: -self.rows[at].longest) for start in starts)
        self.order = [place for rows in steps for place in rows]

    @property
    def epochs(self) -> float:
        """The number of passes over all rows."""
        return len(self.order) / len(self.rows)


class RunningMeans:
    """Means of figures since the last ``take``, kept as sums and counts that can be added over processes.

    Attributes:
        totals: (2, number of names) float64; sums and counts.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.totals = torch.zeros(2, len(self.names), dtype=torch.float64)

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Add values of a figure, only those at ``where`` if it is given (bool, like ``values``)."""
        values = values.detach() if where is None else values.detach()[where]
        column = self.names.index(name)
        self.totals[0, column] += values.double().sum().cpu()
        self.totals[1, column] += values.numel()

    def add_mean(self, name: str, mean: Tensor, count: float) -> None:
        """Add ``count`` values of a figure by their mean, a tensor with one element. They may be weighted."""
        column = self.names.index(name)
        self.totals[0, column] += mean.detach().double().cpu() * count
        self.totals[1, column] += count

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all processes, and start again from zero. ``add_up`` sums a tensor over processes."""
        sums, counts = add_up(self.totals).tolist()
        self.totals = torch.zeros_like(self.totals)
        return {name: total / count for name, total, count in zip(self.names, sums, counts, strict=True) if count}


class ResponseTrainer(Trainer):
    """A trainer with rows in a given order, responses as batches, and a log file: the base of all trainings.

    It appends ``figures`` to the log besides loss and learning rate, and stops where the training diverges.
    ``held_out`` are rows that it measures its loss on.
    """

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, rows: OrderedRows, log: Path, figures: Sequence[str]
    ):
        rows.group(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=self.batch)
        self.remove_callback(PrinterCallback)  # the reporter shows progress
        self.rows = rows
        self.held_out: Sequence[TrainingRow] = ()
        self.log_file = log
        self.means = RunningMeans(figures)
        self.watch = Watch()

    def batch(self, rows: Sequence[TrainingRow]) -> Inputs:
        """Return the model's inputs: what ``laid_out`` returns, field by field."""
        return dict(vars(self.laid_out(rows)))

    def laid_out(self, rows: Sequence[TrainingRow]) -> Batch | Packed:
        """Return all responses of the first row, then of the next, in the layout that the model takes."""
        return laid_out(rows, layout_of(self.model))

    def training_step(self, model: Module, inputs: Inputs, *more: Any, **named: Any) -> Tensor:
        """Do one part of a step, under watch."""
        self.watch.part(inputs)
        loss = super().training_step(model, inputs, *more, **named)
        self.watch.loss = self.watch.loss + loss.detach()
        return loss

    def check_step(self, step: int, saved: bool) -> None:
        """Raise DivergedError where the loss of a step is not finite, or weights about to be ``saved`` are not."""
        self.watch.check_loss(step, self._added_up)
        if saved and self.model is not None:
            check_weights(step, self.model.parameters(), self._added_up)

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """Add the figures to the logs, and a row to the log file. Every process must call this.

        Raises:
            DivergedError: the norm of the gradient is not finite.
        """
        step = self.state.global_step
        if "loss" in logs:
            skipped = bool(self.accelerator.optimizer_step_was_skipped)
            self.watch.check_gradient(step, logs.get("grad_norm", 0.0), skipped)
            logs |= self.means.take(self._added_up)
            logs |= self.watch.take(lambda row: self.accelerator.gather(self._on_device(row)).cpu())
        super().log(logs, *more, **named)
        if ("loss" in logs or held_out.LOSS in logs) and self.is_world_process_zero():
            epoch = self.rows.epochs * step / self.state.max_steps
            row = {
                "step": step,
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **logs,
                "epoch": epoch,
            }
            # JSON has neither infinities nor NaN.
            row = {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
            with self.log_file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(row) + "\n")

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out rows under the model as it is, without dropout, and log the figures.

        The loss is the training's own, averaged over all held-out rows as it is over those of a step.

        Raises:
            DivergedError: it is not finite.
        """
        accelerator = self.accelerator
        before, self.means = self.means, RunningMeans((*self.means.names, held_out.LOSS))
        rows = sorted(self.held_out, key=lambda row: (row.longest, row.key))
        size, processes = self.args.per_device_train_batch_size, accelerator.num_processes
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        self.model_wrapped.eval()
        for start in range(0, len(batches), processes):
            # A model sharded over devices needs all processes in each pass: one without a batch repeats the last one.
            place = start + accelerator.process_index
            kept = self.means
            if place >= len(batches):
                self.means = RunningMeans(kept.names)
            self._measure(batches[min(place, len(batches) - 1)])
            self.means = kept
        found, self.means = self.means.take(self._added_up), before
        figures = self._figures(found)
        if not math.isfinite(figures[held_out.LOSS]):
            raise DivergedError(self.state.global_step, f"the held-out loss is {figures[held_out.LOSS]}")
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _measure(self, rows: Sequence[TrainingRow]) -> None:
        """Add the rows' loss, and what else is measured, to the means."""
        raise NotImplementedError

    def _figures(self, found: Mapping[str, float]) -> dict[str, float]:
        """Return the figures to log of held-out rows from the means over them."""
        return {held_out.LOSS: found[held_out.LOSS]}

    def _on_device(self, tensor: Tensor) -> Tensor:
        device = self.accelerator.device
        # Devices without float64 take the sums in float32.
        return tensor.to(device, torch.float32 if device.type == "mps" else torch.float64)

    def _added_up(self, sums: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        total: Tensor = self.accelerator.reduce(self._on_device(sums), "sum")
        return total.cpu()

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.rows)


class TrainingCallback(TrainerCallback):
    """A callback that calls functions of a stage while its trainer trains.

    Args:
        begin: called before the first step, with the model on its devices.
        step: called after each step with its number and whether it is saved; says whether to measure held-out rows.
        logged: called with what was logged.
    """

    def __init__(
        self,
        begin: Callable[[], None],
        step: Callable[[int, bool], bool],
        logged: Callable[[Mapping[str, float]], None],
    ):
        self.begin = begin
        self.step = step
        self.logged = logged

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Call ``begin``."""
        self.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Call ``step``."""
        control.should_evaluate = self.step(state.global_step, control.should_save)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Call ``logged``."""
        self.logged(kwargs["logs"])


class SftTrainer(ResponseTrainer):
    """Trains with −log π(y | x) of the responses, averaged over all their tokens in a step's batch.

    With ``twice`` each row is there twice, all rows and then all again: SymNoise gives the two opposite noise.
    """

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, rows: OrderedRows, log: Path, twice: bool = False
    ):
        super().__init__(model, args, rows, log, figures=("length/response",))
        self.twice = twice
        # Lets the trainer count the labels of a step over all processes, and leave scaling to the loss.
        self.model_accepts_loss_kwargs = True

    def batch(self, rows: Sequence[TrainingRow]) -> Inputs:
        """Return the model's inputs for a part of a step, and labels for the trainer to count."""
        return self._labelled([*rows, *rows] if self.twice else rows)

    def _labelled(self, rows: Sequence[TrainingRow]) -> Inputs:
        laid_out = self.laid_out(rows)
        labels = pad(laid_out.targets, (1, 0), value=NO_LABEL)  # the first label of a row is not counted
        return {**vars(laid_out), "labels": labels[None]}

    def compute_loss(
        self, model: Module, inputs: Inputs, *_: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of this part of a step's batch as its share of the mean over the batch's tokens.

        It is multiplied by the number of processes, as the gradient is averaged over them.
        """
        outputs = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs})
        self.means.add("length/response", outputs["lengths"])
        assert num_items_in_batch is not None
        loss: Tensor = -outputs["sums"].sum() / num_items_in_batch * self.accelerator.num_processes
        return loss

    def _measure(self, rows: Sequence[TrainingRow]) -> None:
        inputs = self._prepare_inputs(self._labelled(rows))
        with self.compute_loss_context_manager():
            total = self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=self.accelerator.num_processes)
        tokens = sum(len(answer) for row in rows for answer in row.answers)
        self.means.add_mean(held_out.LOSS, total / tokens, tokens)
