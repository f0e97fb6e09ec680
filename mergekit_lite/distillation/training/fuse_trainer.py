"""The trainer on teachers' distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from transformers import PreTrainedModel, TrainingArguments

from mergekit_lite.distillation.objectives.targets import Targets
from mergekit_lite.distillation.training import held_out
from mergekit_lite.distillation.training.rows import TrainingRow
from mergekit_lite.distillation.training.taught_rows import TaughtBy, laid_out
from mergekit_lite.distillation.training.trainer import MODEL_INPUTS, NO_LABEL, Inputs, OrderedRows, ResponseTrainer


class Counts(NamedTuple):
    """What the parts of a step's batch have over all processes: tokens, () int64, and groups, () float32."""

    tokens: Tensor
    groups: Tensor


class FuseTrainer(ResponseTrainer):
    """Trains with λ · CLM + (1 − λ) · D.

    CLM is SFT's loss: −log π(y | x) averaged over all tokens in a step's batch. D adds up w · d over teachers, rows and
    groups, with the weight w of a teacher in a row and its distance d in a group, and divides by the groups of the
    batch; those of a row are the mean of its teachers' under their weights. A distance ``by_token`` counts a group as
    often as it has tokens of the student. With λ = 1 it is SFT, bit for bit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        rows: OrderedRows,
        log: Path,
        teachers: Sequence[TaughtBy],
        clm: float,
    ):
        self.teachers = teachers
        self.names = [each.teacher.name for each in teachers]
        figures = [f"{figure}/{name}" for figure in ("distance", "weight") for name in self.names]
        super().__init__(model, args, rows, log, ("length/response", "clm", "distance", *figures, "grouped"))
        self.model_accepts_loss_kwargs = True  # has the trainer count what a step has, and leave scaling to the loss
        self.clm = clm

    def batch(self, rows: Sequence[TrainingRow]) -> Inputs:
        """Return the model's inputs, labels and groups to count, and what teachers say, with their weights (B, N)."""
        placed = super().laid_out(rows)
        inputs = {**vars(placed), "labels": pad(placed.targets, (1, 0), value=NO_LABEL)[None]}
        lessons = [row.lesson for row in rows if row.lesson is not None]
        inputs["groups"] = torch.tensor(sum(lesson.groups for lesson in lessons))
        weights = torch.zeros(len(rows), len(self.teachers))
        for number, lesson in enumerate(lessons):
            for part in lesson.parts:
                weights[number, part.teacher] = part.weight
        inputs["weights"] = weights
        if self.clm < 1:
            said = laid_out(rows, self.teachers)
            inputs["taught"] = [
                {"teacher": each.teacher, "targets": vars(each.targets), "weights": each.weights} for each in said
            ]
        return inputs

    def _get_num_items_in_batch(self, batch_samples: list[Inputs], device: torch.device) -> Any:
        tokens: Any = super()._get_num_items_in_batch(batch_samples, device)
        groups = torch.stack([each["groups"] for each in batch_samples]).sum().to(device)
        if self.args.world_size > 1:
            groups = self.accelerator.gather(groups[None]).sum()
        return Counts(tokens, groups)

    def compute_loss(self, model: Module, inputs: Inputs, *_: Any, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss of this part of a step's batch as its share of the loss of the batch.

        It is multiplied by the number of processes, as the gradient is averaged over them.
        """
        counts: Counts = num_items_in_batch
        processes = self.accelerator.num_processes
        total, distance = self._sums(model, inputs)
        loss: Tensor = -total / counts.tokens * processes
        if distance is None:
            return loss
        fused: Tensor = self.clm * loss + (1 - self.clm) * (distance / counts.groups.clamp(min=1e-9) * processes)
        return fused

    def _sums(self, model: Module, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Return Σ log π(y | x) and Σ w · d of these rows, and add their figures to the means."""
        taught = inputs.get("taught")
        given = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        if taught:
            given["taught"] = [(each["teacher"], Targets(**each["targets"])) for each in taught]
        outputs = model(**given)
        total, tokens = outputs["sums"].sum(), int(outputs["lengths"].sum())
        self.means.add("length/response", outputs["lengths"])
        self.means.add_mean("clm", -total / tokens, tokens)
        for number, name in enumerate(self.names):
            self.means.add(f"weight/{name}", inputs["weights"][:, number])
        if self.clm == 1:
            return total, None
        distance, grouped = total.new_zeros(()), torch.zeros(tokens, dtype=torch.bool, device=total.device)
        for each, losses in zip(taught or (), outputs.get("distances", ()), strict=True):
            weighted, weight = (each["weights"] * losses).sum(), each["weights"].sum()
            distance = distance + weighted
            self.means.add_mean(f"distance/{self.names[each['teacher']]}", weighted / weight, float(weight))
            grouped |= each["targets"]["student_groups"] >= 0
        if groups := float(inputs["groups"]):
            self.means.add_mean("distance", distance / groups, groups)
        self.means.add("grouped", grouped)
        return total, distance

    def _measure(self, rows: Sequence[TrainingRow]) -> None:
        inputs = self._prepare_inputs(self.batch(rows))
        with self.compute_loss_context_manager():
            self._sums(self.model_wrapped, inputs)

    def _figures(self, found: Mapping[str, float]) -> dict[str, float]:
        return {held_out.LOSS: self.clm * found["clm"] + (1 - self.clm) * found.get("distance", 0.0)}
