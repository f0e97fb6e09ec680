"""The trainer of on-policy distillation. Imported only for training, as transformers loads slowly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_lite.distillation.objectives.on_policy import policy_gradient
from mergekit_lite.distillation.on_policy.answers import OwnRow
from mergekit_lite.distillation.recipe.schema import OnPolicy
from mergekit_lite.distillation.training.rows import TrainingRow
from mergekit_lite.distillation.training.trainer import (
    MODEL_INPUTS,
    Inputs,
    OrderedRows,
    ResponseTrainer,
    RunningMeans,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

ADVANTAGE, SQUARES, STD = "advantage/mean", "advantage/squares", "advantage/std"


class Places(OrderedRows):
    """The places of all rows of a training, round after round: a round's rows aren't there before it begins."""

    def __init__(self, rounds: int, size: int):
        super().__init__((), range(rounds * size))
        self.rounds = rounds
        self.size = size  # rows of a round, with repetitions

    def __getitem__(self, position: int) -> int:  # type: ignore[override]  # the trainer takes the row of that place
        return position

    def group(self, step: int) -> None:
        """Leave the places as they are."""

    @property
    def epochs(self) -> float:
        """The number of rounds."""
        return self.rounds


class Figures(RunningMeans):
    """Means of figures, and the standard deviation of advantages."""

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return them over all processes, and start again from zero."""
        found = super().take(add_up)
        if SQUARES in found:
            found[STD] = math.sqrt(max(0.0, found.pop(SQUARES) - found[ADVANTAGE] ** 2))
        return found


class OnPolicyTrainer(ResponseTrainer):
    """Trains with the policy gradient of advantages, averaged over all tokens of a step that have one.

    ``begin`` gives the rows of a round, counted from 0, when its first step is about to be done.
    """

    rows: Places
    begin: Callable[[int], OrderedRows]

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        places: Places,
        log: Path,
        settings: OnPolicy,
        teachers: Sequence[str],
    ):
        self.teachers = tuple(teachers) if len(teachers) > 1 else ()  # that have a figure of their own
        figures = ("length/response", "reverse_kl", ADVANTAGE, SQUARES, "ratio")
        clipped = () if settings.clip is None else ("clipped",)
        super().__init__(model, args, places, log, figures)
        self.means = Figures((*figures, *clipped, *(f"reverse_kl/{name}" for name in self.teachers)))
        self.model_accepts_loss_kwargs = True  # so the trainer leaves scaling to the loss
        self.settings = settings
        self._round = -1
        self._rows = OrderedRows((), ())

    def batch(self, rows: Sequence[Any]) -> Inputs:
        """Return the places: what lies there is taken when the step begins, for the next round's rows aren't there."""
        return {"places": torch.tensor(rows)}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], Tensor]:
        """Return the parts of the next step, and the number of tokens with advantages in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [self._part(batch["places"].tolist()) for batch in batches]
        tokens = sum(int(part["counted"].sum()) for part in parts)
        return parts, self._added_up(torch.tensor(float(tokens))).clamp(min=1)

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """Add the round to the logs of a step. Raises as that of the base."""
        super().log({**logs, "round": self._round + 1} if "loss" in logs else logs, *more, **named)

    def compute_loss(
        self, model: Module, inputs: Inputs, *_: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of this part of a step as its share of the mean over the tokens of the step.

        It is multiplied by the number of processes, as the gradient is averaged over them.
        """
        log_probs = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, by_token=True)["tokens"]
        counted = inputs["counted"]
        found = policy_gradient(log_probs, inputs["drawn"], inputs["advantages"], self.settings.clip)
        self.means.add("ratio", found.ratios, counted)
        if self.settings.clip is not None:
            self.means.add("clipped", found.clipped, counted)
        assert num_items_in_batch is not None
        total = torch.where(counted, found.losses, 0.0).sum()
        loss: Tensor = total / num_items_in_batch * self.accelerator.num_processes
        return loss

    @torch.no_grad()
    def log_probs(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return log π of the tokens of each row under the model as it is, as the loss computes them."""
        self.model_wrapped.eval()
        inputs = self._prepare_inputs(super().batch(rows))
        with self.compute_loss_context_manager():
            tokens = self.model_wrapped(**inputs, by_token=True)["tokens"]
        each = torch.split(tokens.float().cpu(), [len(row.answers[0]) for row in rows])
        return [values.tolist() for values in each]

    def _part(self, places: Sequence[int]) -> Inputs:
        """Return the model's inputs for the rows of some places, their advantages, and note their figures."""
        number = places[0] // self.rows.size
        if number != self._round:
            self._rows = self.begin(number)
            self._round = number
        rows = [self._rows[place % self.rows.size] for place in places]
        inputs = super().batch(rows)
        own = [row for row in rows if isinstance(row, OwnRow)]
        log_ratios = torch.cat([row.log_ratios for row in own])
        counted = ~log_ratios.isnan()
        advantages = -self.settings.coef * log_ratios
        self.means.add("length/response", torch.tensor([float(len(row.drawn)) for row in own]))
        self.means.add("reverse_kl", log_ratios, counted)
        self.means.add(ADVANTAGE, advantages, counted)
        self.means.add(SQUARES, advantages.double() ** 2, counted)
        for name in self.teachers:
            taught = [row.by_teacher[name] for row in own if name in row.by_teacher]
            values = torch.cat(taught) if taught else torch.zeros(0)
            self.means.add(f"reverse_kl/{name}", values, ~values.isnan())
        drawn = torch.cat([row.drawn for row in own])
        return inputs | {"drawn": drawn, "advantages": advantages.nan_to_num(0.0), "counted": counted}
