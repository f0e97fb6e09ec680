"""The trainer on judgments: CUT. Imported only for training, as transformers loads slowly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel, TrainingArguments

from mergekit_lite.distillation.objectives.cut import criticised, unlikelihood
from mergekit_lite.distillation.recipe.schema import Unlikelihood
from mergekit_lite.distillation.training import held_out
from mergekit_lite.distillation.training.rows import TrainingRow
from mergekit_lite.distillation.training.trainer import MODEL_INPUTS, Inputs, OrderedRows, ResponseTrainer


class JudgedTrainer(ResponseTrainer):
    """Trains with CUT's loss, averaged over the rows of a step.

    That of a row is −log p averaged over the tokens of its answer, in the context of its judgment where it has one;
    then it is the mean of that and of ``unlikelihood`` averaged over the tokens. So it is in the released runs, which
    have one row in a part of a step.
    """

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, rows: OrderedRows, log: Path, settings: Unlikelihood
    ):
        super().__init__(model, args, rows, log, ("length/response", "clm", "unlikelihood", "criticised"))
        self.model_accepts_loss_kwargs = False  # all parts have equally many rows, so the trainer may scale the means
        self.settings = settings

    def batch(self, rows: Sequence[TrainingRow]) -> Inputs:
        """Return the model's inputs: all rows in their first context, then those with a judgment without it.

        ``weights`` are of the tokens of the first, ``places`` are those of the second among them, ``answers`` the
        numbers of tokens of the rows.
        """
        first = [row if row.judged is None else replace(row, prompt=row.judged) for row in rows]
        inputs = super().batch([*first, *(row for row in rows if row.judged is not None)])
        answers = torch.tensor([len(row.answers[0]) for row in rows])
        has_judgment = torch.tensor([row.judged is not None for row in rows])
        numbers = torch.arange(len(rows)).repeat_interleave(answers)
        weights = (1 / answers / (1 + has_judgment.float()))[numbers]
        return inputs | {"weights": weights, "places": has_judgment[numbers].nonzero()[:, 0], "answers": answers}

    def compute_loss(self, model: Module, inputs: Inputs, *_: Any, **__: Any) -> Tensor:
        """Return the mean loss of these rows, and add their figures to the means."""
        tokens = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, by_token=True)["tokens"]
        weights, places = inputs["weights"], inputs["places"]
        first, plain = tokens.split([len(weights), len(places)])
        judged, (threshold, weight) = first[places], (self.settings.threshold, self.settings.weight)
        unlikely = unlikelihood(judged, plain, threshold, weight)
        self.means.add("clm", -first)
        self.means.add("unlikelihood", unlikely)
        self.means.add("criticised", criticised(judged, plain, threshold))
        self.means.add("length/response", inputs["answers"])
        total: Tensor = (weights * -first).sum() + (weights[places] * unlikely).sum()
        return total / len(inputs["answers"])

    def _measure(self, rows: Sequence[TrainingRow]) -> None:
        inputs = self._prepare_inputs(self.batch(rows))
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model_wrapped, inputs)
        self.means.add_mean(held_out.LOSS, loss, len(rows))
