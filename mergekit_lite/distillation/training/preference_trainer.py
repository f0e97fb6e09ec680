"""The trainer on preferences. Imported only for training, as transformers loads slowly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel, TrainingArguments

from mergekit_lite.distillation.objectives.preference import LogProbs, Objective, gap_of
from mergekit_lite.distillation.training import held_out
from mergekit_lite.distillation.training.rows import TrainingRow
from mergekit_lite.distillation.training.trainer import MODEL_INPUTS, Inputs, OrderedRows, ResponseTrainer

ROLES = ("source", "target")
CONFIDENCES = "confidences"  # of the last steps, in the trainer's state, which checkpoints have


class PreferenceTrainer(ResponseTrainer):
    """Trains with an objective's loss under its options, averaged over the rows of a batch.

    ``reference`` has s_ref of a row's responses by the row's key, ``round`` s_t. Those that the objective needs must be
    filled before the first step. Only what it needs is computed.
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
        self.reference: Mapping[str, Sequence[float]] = {}
        self.round: Mapping[str, Sequence[float]] = {}
        self.mixed = objective.mixes and options["mix"] != 1  # else the mixed logits are the model's own
        self._confidences: list[Tensor] = []  # of this process, since the last step

    def batch(self, rows: Sequence[TrainingRow]) -> Inputs:
        """Return the model's inputs, and per row and response roles, s_ref, s_t and wins.

        In rows without wins the chosen responses win with probability 1, the rejected one with 0.
        """
        inputs = super().batch(rows)
        inputs["roles"] = torch.tensor([[ROLES.index(role) for role in row.roles] for row in rows])
        for name, needed, known in (
            ("reference", self.objective.reference, self.reference),
            ("round", self.objective.rounds, self.round),
        ):
            if needed:
                inputs[name] = torch.tensor([known[row.key] for row in rows])
        sure = (*(1.0,) * (len(rows[0].roles) - 1 - self.objective.own), 0.0)
        inputs["wins"] = torch.tensor([row.wins or sure for row in rows])
        return inputs

    def compute_loss(self, model: Module, inputs: Inputs, *_: Any, **__: Any) -> Tensor:
        """Return the mean loss of these rows, and add their figures to the means."""
        outputs = model(
            **{name: inputs[name] for name in MODEL_INPUTS if name in inputs},
            squares=self.objective.squares,
            mixed=self.mixed,
        )
        rows = self.log_probs(outputs, inputs)
        outcome = self.objective(rows, **self.options)
        if outcome.confidences is not None and self.model_wrapped.training:
            self._confidences.append(outcome.confidences.flatten())
        chosen_roles = inputs["roles"][:, : rows.chosen.shape[1]]
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

    def check_step(self, step: int, saved: bool) -> None:
        """Do as the base, and keep the confidences of the step where the objective needs those of the last ones.

        Whole steps are kept, so the order of their rows and how they are spread over processes don't matter.
        """
        super().check_step(step, saved)
        if not self.objective.mixes:
            return
        found = self.accelerator.gather(torch.cat(self._confidences)).tolist()
        self._confidences = []
        steps = [*self._kept_confidences(), sorted(found)]
        while sum(map(len, steps[1:])) >= self.options["window"]:
            del steps[0]
        self.state.stateful_callbacks[CONFIDENCES] = steps  # type: ignore[index, call-overload]  # a dictionary

    def _kept_confidences(self) -> list[list[float]]:
        """Return the confidences of the last steps, by step: as many steps as ``window`` pairs take."""
        kept: list[list[float]] = self.state.stateful_callbacks.get(CONFIDENCES, [])  # type: ignore[union-attr]
        return kept

    def _measure(self, rows: Sequence[TrainingRow]) -> None:
        inputs = self._prepare_inputs(self.batch(rows))
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model_wrapped, inputs)
        self.means.add_mean(held_out.LOSS, loss, len(rows))

    def _figures(self, found: Mapping[str, float]) -> dict[str, float]:
        names = {held_out.LOSS: held_out.LOSS, held_out.ACCURACY: "accuracy", held_out.MARGIN: "margin"}
        return {key: found[name] for key, name in names.items() if name in found}

    @torch.no_grad()
    def start_log_probs(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return s of the rows' responses under the model as it is on its devices, without dropout."""
        self.model_wrapped.eval()
        inputs = self._prepare_inputs(super().batch(rows))
        with self.compute_loss_context_manager():
            sums = self.model_wrapped(**inputs)["sums"]
        by_row: list[list[float]] = sums.float().view(len(rows), -1).tolist()
        return by_row

    def log_probs(self, outputs: Mapping[str, Tensor], inputs: Inputs) -> LogProbs:
        """Return the model's outputs as objectives take them: split into chosen and rejected responses of each row."""
        shape, own = inputs["roles"].shape, self.objective.own
        lengths = outputs["lengths"].to(outputs["sums"].dtype)
        parts = {"{}": outputs["sums"], "{}_lengths": lengths, "{}_wins": inputs["wins"]}
        parts |= {f"{name}_{{}}": inputs[name] for name in ("reference", "round") if name in inputs}
        if "squares" in outputs:
            parts["{}_squares"] = outputs["squares"]
        if self.objective.mixes:
            parts["mixed_{}"] = outputs["mixed"] if self.mixed else outputs["sums"].detach()
        fields: dict[str, Tensor] = {}
        for name, values in parts.items():
            pairs = values.view(len(inputs["roles"]), -1)[:, : shape[1] - own]
            fields |= {name.format("chosen"): pairs[:, :-1], name.format("rejected"): pairs[:, -1]}
        if own:
            fields |= {"own": outputs["sums"].view(shape)[:, -1], "reference_own": inputs["reference"][:, -1]}
        gap = 0.0
        if self.objective.mixes:
            kept = [each for step in self._kept_confidences() for each in step]
            gap = gap_of(kept, self.options["window"], self.options["quantile"])
        # Held-out rows are measured with what the end of training will have, so that steps can be compared.
        progress = self.state.global_step / self.state.max_steps if self.model_wrapped.training else 1.0
        return LogProbs(**fields, gap=gap, progress=progress)
