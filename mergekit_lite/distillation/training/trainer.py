"""transformers' trainer with the losses of this package. Imported only for training, as transformers loads slowly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mergekit_lite.answers.logprobs import Batch, padded
from mergekit_lite.answers.packing import Packed, packed
from mergekit_lite.distillation.objectives import LogProbs, Objective
from mergekit_lite.distillation.training.model import layout_of
from mergekit_lite.distillation.training.rows import TrainingRow

Inputs = dict[str, Any]
ROLES = ("source", "target")
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

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all processes, and start again from zero. ``add_up`` sums a tensor over processes."""
        sums, counts = add_up(self.totals).tolist()
        self.totals = torch.zeros_like(self.totals)
        return {name: total / count for name, total, count in zip(self.names, sums, counts, strict=True) if count}


class ResponseTrainer(Trainer):
    """A trainer with rows in a given order, responses as batches, and a log file: the base of both trainings.

    It appends ``figures`` to the log besides loss and learning rate.
    """

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, rows: OrderedRows, log: Path, figures: Sequence[str]
    ):
        rows.group(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=self.batch)
        self.remove_callback(PrinterCallback)  # the reporter shows progress
        self.rows = rows
        self.log_file = log
        self.means = RunningMeans(figures)

    def batch(self, rows: Sequence[TrainingRow]) -> Inputs:
        """Return the model's inputs: what ``laid_out`` returns, field by field."""
        return dict(vars(self.laid_out(rows)))

    def laid_out(self, rows: Sequence[TrainingRow]) -> Batch | Packed:
        """Return all responses of the first row, then of the next, in the layout that the model takes."""
        layout = layout_of(self.model)
        if layout == "padded":
            return padded([response for row in rows for response in row.responses])
        return packed([row.responses for row in rows], share=layout == "shared")

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """Add the figures to the logs, and a row to the log file. Every process must call this."""
        step_row = "loss" in logs
        if step_row:
            device = self.accelerator.device
            # Devices without float64 take the sums in float32.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            logs |= self.means.take(lambda sums: self.accelerator.reduce(sums.to(device, dtype), "sum").cpu())
        super().log(logs, *more, **named)
        if step_row and self.is_world_process_zero():
            epoch = self.rows.epochs * self.state.global_step / self.state.max_steps
            row = {"step": self.state.global_step, **logs, "epoch": epoch}
            # JSON has neither infinities nor NaN.
            row = {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.rows)


class TrainingCallback(TrainerCallback):
    """A callback that calls ``begin`` before the first step, with the model on its devices, and ``step`` after each."""

    def __init__(self, begin: Callable[[], None], step: Callable[[], None]):
        self.begin = begin
        self.step = step

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Call ``begin``."""
        self.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Call ``step``."""
        self.step()


class SftTrainer(ResponseTrainer):
    """Trains with −log π(y | x) of the responses, averaged over all their tokens in a step's batch."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, rows: OrderedRows, log: Path):
        super().__init__(model, args, rows, log, figures=("length/response",))
        # Lets the trainer count the labels of a step over all processes, and leave scaling to the loss.
        self.model_accepts_loss_kwargs = True

    def batch(self, rows: Sequence[TrainingRow]) -> Inputs:
        """Return the model's inputs, and labels for the trainer to count."""
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


class PreferenceTrainer(ResponseTrainer):
    """Trains with an objective's loss under its options, averaged over the rows of a batch.

    ``reference`` has s_ref of a row's responses, by the row's key. It must be filled before the first step.
    """

    objective: Objective

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        rows: OrderedRows,
        log: Path,
        objective: Objective,
        options: Mapping[str, Any],
    ):
        by_role = [f"{figure}/{role}" for figure in ("length", "rewards") for role in (*ROLES, "rejected")]
        accuracies = ["accuracy", *(f"accuracy/{role}" for role in ROLES)]
        super().__init__(model, args, rows, log, (*by_role, *accuracies, "margin", "alpha", "kl"))
        self.model_accepts_loss_kwargs = False  # all parts have equally many rows, so the trainer may scale the means
        self.objective = objective
        self.options = options
        self.reference: dict[str, Sequence[float]] = {}

    def batch(self, rows: Sequence[TrainingRow]) -> Inputs:
        """Return the model's inputs, and per row and response roles, s_ref and wins.

        In rows without wins the chosen responses win with probability 1, the rejected one with 0.
        """
        inputs = super().batch(rows)
        inputs["roles"] = torch.tensor([[ROLES.index(role) for role in row.roles] for row in rows])
        if self.objective.reference:
            inputs["reference"] = torch.tensor([self.reference[row.key] for row in rows])
        sure = (*(1.0,) * (len(rows[0].roles) - 1), 0.0)
        inputs["wins"] = torch.tensor([row.wins or sure for row in rows])
        return inputs

    def compute_loss(self, model: Module, inputs: Inputs, *_: Any, **__: Any) -> Tensor:
        """Return the mean loss of these rows, and add their figures to the means."""
        outputs = model(
            **{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, squares=self.objective.squares
        )
        rows = self.log_probs(outputs, inputs)
        outcome = self.objective(rows, **self.options)
        chosen_roles = inputs["roles"][:, :-1]
        for number, role in enumerate(ROLES):
            where = chosen_roles == number
            self.means.add(f"length/{role}", rows.chosen_lengths, where)
            self.means.add(f"rewards/{role}", outcome.chosen_rewards, where)
            self.means.add(f"accuracy/{role}", outcome.chosen_accuracies, where)
        self.means.add("length/rejected", rows.rejected_lengths)
        self.means.add("rewards/rejected", outcome.rejected_rewards)
        self.means.add("accuracy", outcome.accuracies)
        self.means.add("margin", outcome.margins)
        if outcome.alpha is not None:
            self.means.add("alpha", torch.tensor([outcome.alpha]))
        if self.objective.reference:
            own = inputs["roles"] == ROLES.index("target")
            self.means.add("kl", inputs["reference"] - outputs["sums"].view_as(inputs["reference"]), own)
        loss: Tensor = outcome.loss.mean()
        return loss

    @torch.no_grad()
    def reference_log_probs(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return s of the rows' responses under the model as it is on its devices, without dropout."""
        self.model_wrapped.eval()
        inputs = self._prepare_inputs(super().batch(rows))
        with self.compute_loss_context_manager():
            sums = self.model_wrapped(**inputs)["sums"]
        by_row: list[list[float]] = sums.float().view(len(rows), -1).tolist()
        return by_row

    def log_probs(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> LogProbs:
        """Return the model's outputs as objectives take them: split into chosen and rejected responses of each row."""
        shape = inputs["roles"].shape
        lengths = outputs["lengths"].to(outputs["sums"].dtype)
        parts = {"": outputs["sums"], "_lengths": lengths, "_wins": inputs["wins"]}
        if "squares" in outputs:
            parts["_squares"] = outputs["squares"]
        fields = {f"chosen{name}": values.view(shape)[:, :-1] for name, values in parts.items()}
        fields |= {f"rejected{name}": values.view(shape)[:, -1] for name, values in parts.items()}
        if self.objective.reference:
            reference = inputs["reference"]
            fields |= {"reference_chosen": reference[:, :-1], "reference_rejected": reference[:, -1]}
        return LogProbs(**fields, progress=self.state.global_step / self.state.max_steps)
