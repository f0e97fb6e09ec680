"""transformers' trainer with the losses of this package. Imported when training begins, for it needs transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mergekit_lite.answers.logprobs import padded
from mergekit_lite.distillation.objectives import LogProbs, Objective
from mergekit_lite.distillation.training.rows import Row

Inputs = dict[str, Any]
ROLES = ("source", "target")
MODEL_INPUTS = ("input_ids", "attention_mask", "responses")
NO_LABEL = -100  # what transformers calls positions that don't count


class Places(Dataset[Row]):
    """The rows in the order in which training sees them."""

    def __init__(self, rows: Sequence[Row], order: Sequence[int]):
        self.rows = rows
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Row:
        return self.rows[self.order[place]]


class Means:
    """Figures since they were last taken, as sums and counts that add up over processes."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.totals = torch.zeros(2, len(self.names), dtype=torch.float64)

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Take values in, those at ``where`` only."""
        values = values.detach() if where is None else values.detach()[where]
        at = self.names.index(name)
        self.totals[0, at] += values.double().sum().cpu()
        self.totals[1, at] += values.numel()

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all processes, and begin anew."""
        sums, counts = add_up(self.totals).tolist()
        self.totals = torch.zeros_like(self.totals)
        return {name: total / count for name, total, count in zip(self.names, sums, counts, strict=True) if count}


class ResponseTrainer(Trainer):
    """What both stages have: rows in a given order, a log, responses as batches.

    Args:
        model: of ``trained_model``.
        args: of ``training_arguments``.
        places: the rows of all steps.
        log: the file that takes ``figures``.
        epochs: that all steps make.
        figures: the names of what is logged beside loss and learning rate.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        places: Places,
        log: Path,
        epochs: float,
        figures: Sequence[str],
    ):
        super().__init__(model=model, args=args, train_dataset=places, data_collator=self.batch)
        self.remove_callback(PrinterCallback)  # the stage tells
        self.places = places
        self.log_file = log
        self.epochs = epochs
        self.means = Means(figures)

    def batch(self, rows: Sequence[Row]) -> Inputs:
        """What the model takes: the responses of the first row, then of the next."""
        made = padded([response for row in rows for response in row.responses])
        return {"input_ids": made.input_ids, "attention_mask": made.attention_mask, "responses": made.responses}

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """Add the figures, and a line to the log file; called on every process."""
        step_row = "loss" in logs
        if step_row:
            device = self.accelerator.device
            # Devices without float64 take the sums in float32.
            kind = torch.float32 if device.type == "mps" else torch.float64
            logs |= self.means.take(lambda sums: self.accelerator.reduce(sums.to(device, kind), "sum").cpu())
        super().log(logs, *more, **named)
        if step_row and self.is_world_process_zero():
            epoch = self.epochs * self.state.global_step / self.state.max_steps
            row = {"step": self.state.global_step, **logs, "epoch": epoch}
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(row)) + "\n")

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.places)


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without figures that JSON can't say."""
    return {name: value for name, value in row.items() if not isinstance(value, float) or abs(value) < float("inf")}


class Hook(TrainerCallback):
    """Calls ``begin`` before the first step, with the model on its devices, and ``step`` after each."""

    def __init__(self, begin: Callable[[], None], step: Callable[[], None]):
        self.begin = begin
        self.step = step

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step()


class SftTrainer(ResponseTrainer):
    """−log π(y | x) of the responses, averaged over all their tokens in a step's batch."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, places: Places, log: Path, epochs: float):
        super().__init__(model, args, places, log, epochs, figures=("length/response",))
        # The trainer then counts the labels of a step over all processes, and leaves scaling to the loss.
        self.model_accepts_loss_kwargs = True

    def batch(self, rows: Sequence[Row]) -> Inputs:
        """With labels, for the trainer to count."""
        inputs = super().batch(rows)
        inputs["labels"] = torch.where(inputs["responses"], inputs["input_ids"], NO_LABEL)
        return inputs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The share of this part of the batch; its gradient is averaged over processes, so it counts that often."""
        found = model(**{name: inputs[name] for name in MODEL_INPUTS})
        self.means.add("length/response", found["lengths"])
        assert num_items_in_batch is not None
        loss: Tensor = -found["sums"].sum() / num_items_in_batch * self.accelerator.num_processes
        return loss


class PreferenceTrainer(ResponseTrainer):
    """An objective's loss, averaged over the rows of a batch.

    Args:
        objective: what is minimised.
        options: its keywords.

    Attributes:
        reference: s_ref of a row's responses, by the row's key. To be filled before the first step.
    """

    objective: Objective

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        places: Places,
        log: Path,
        epochs: float,
        objective: Objective,
        options: Mapping[str, Any],
    ):
        by_role = [f"{what}/{role}" for what in ("length", "rewards") for role in (*ROLES, "rejected")]
        accuracies = ["accuracy", *(f"accuracy/{role}" for role in ROLES)]
        super().__init__(model, args, places, log, epochs, (*by_role, *accuracies, "margin", "alpha", "kl"))
        self.model_accepts_loss_kwargs = False  # the mean over rows of equal parts: the trainer's to scale
        self.objective = objective
        self.options = options
        self.reference: dict[str, Sequence[float]] = {}

    def batch(self, rows: Sequence[Row]) -> Inputs:
        """With roles, s_ref, and how probably responses win: the chosen surely, where a row doesn't tell."""
        inputs = super().batch(rows)
        inputs["roles"] = torch.tensor([[ROLES.index(role) for role in row.roles] for row in rows])
        if self.objective.reference:
            inputs["reference"] = torch.tensor([self.reference[row.key] for row in rows])
        sure = (*(1.0,) * (len(rows[0].roles) - 1), 0.0)
        inputs["wins"] = torch.tensor([row.wins or sure for row in rows])
        return inputs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean loss of these rows."""
        found = model(**{name: inputs[name] for name in MODEL_INPUTS}, squares=self.objective.squares)
        rows = self.log_probs(found, inputs)
        outcome = self.objective.function(rows, **self.options)
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
            self.means.add("kl", inputs["reference"] - found["sums"].view_as(inputs["reference"]), own)
        loss: Tensor = outcome.loss.mean()
        return loss

    @torch.no_grad()
    def reference_log_probs(self, rows: Sequence[Row]) -> list[list[float]]:
        """s of the rows' responses under the model as it is on its devices, without dropout."""
        self.model_wrapped.eval()
        inputs = self._prepare_inputs(super().batch(rows))
        with self.compute_loss_context_manager():
            found = self.model_wrapped(**inputs)["sums"]
        sums: list[list[float]] = found.float().view(len(rows), -1).tolist()
        return sums

    def log_probs(self, found: Mapping[str, Tensor], inputs: Inputs) -> LogProbs:
        """A batch as objectives take it."""
        shape = inputs["roles"].shape
        lengths = found["lengths"].to(found["sums"].dtype)
        parts = {"": found["sums"], "_lengths": lengths, "_wins": inputs["wins"]}
        if "squares" in found:
            parts["_squares"] = found["squares"]
        given = {f"chosen{name}": values.view(shape)[:, :-1] for name, values in parts.items()}
        given |= {f"rejected{name}": values.view(shape)[:, -1] for name, values in parts.items()}
        if self.objective.reference:
            given |= {"reference_chosen": inputs["reference"][:, :-1], "reference_rejected": inputs["reference"][:, -1]}
        return LogProbs(**given, progress=self.state.global_step / self.state.max_steps)
