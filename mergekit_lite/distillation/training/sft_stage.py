"""SFT with what its section of the recipe adds: noise on embeddings, or judgments of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.recipe.schema import Sft
from mergekit_lite.distillation.training.model import tokenizer_of, trained_model
from mergekit_lite.distillation.training.rows import TokenRows, sft_rows
from mergekit_lite.distillation.training.stage import TrainingStage

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from mergekit_lite.distillation.training.trainer import OrderedRows, ResponseTrainer


@dataclass
class SftStage(TrainingStage):
    """SFT."""

    training: Sft

    def rows(self) -> TokenRows:
        """Return the rows as tokens, with the prompts that tell judgments where these are trained on.

        Raises:
            UsageError: there is none, or judgments are wanted and there is none.
        """
        template, judged = ChatTemplate(tokenizer_of(self.start)), self.training.unlikelihood is not None
        return sft_rows(self.rows_path, template, self.limits, judged)

    def new_trainer(self, args: TrainingArguments, rows: OrderedRows) -> ResponseTrainer:
        """Load the model, and return what trains it on rows in their order."""
        from mergekit_lite.distillation.training.judged_trainer import JudgedTrainer
        from mergekit_lite.distillation.training.trainer import SftTrainer

        noise, log = self.training.noise, self.workspace.log
        model = trained_model(self.start, self.training, dropout=True, seed=self.seed, noise=noise)
        if self.training.unlikelihood is not None:
            return JudgedTrainer(model, args, rows, log, self.training.unlikelihood)
        return SftTrainer(model, args, rows, log, twice=noise is not None and noise.kind == "symnoise")
