"""Preference training: rows of chosen and rejected answers, an objective, and the models that it refers to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.objectives.preference import OBJECTIVES, Objective
from mergekit_lite.distillation.recipe.schema import Preference
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.training.mixing import Mixture
from mergekit_lite.distillation.training.model import frozen_model, tokenizer_of, trained_model
from mergekit_lite.distillation.training.reference import filled, filled_by
from mergekit_lite.distillation.training.rows import TokenRows, TrainingRow, preference_rows
from mergekit_lite.distillation.training.stage import TrainingStage
from mergekit_lite.distillation.training.workspace import identity
from mergekit_lite.errors import UsageError, listing, nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from mergekit_lite.distillation.training.trainer import OrderedRows, ResponseTrainer


def objective_of(training: Preference, problems: list[str]) -> tuple[Objective, dict[str, Any]] | None:
    """Return the objective of a training and all of its options; mistakes become problems."""
    objective = OBJECTIVES.get(training.objective)
    if objective is None:
        hint = nearest(training.objective, OBJECTIVES) or f" There are: {', '.join(OBJECTIVES)}."
        problems.append(f"train.preference: there is no objective {training.objective!r}.{hint}")
        return None
    if training.reference is not None and not objective.reference:
        problems.append(f"train.preference.reference has no effect: {objective.name} has no reference")
    return objective, objective.options(training.options, problems)


@dataclass
class PreferenceStage(TrainingStage):
    """Preference training.

    s_ref is under the recipe's ``reference``, where it names one, and s_t under the model that training starts from.
    Else that is the reference.
    """

    training: Preference
    _references: Mapping[str, Sequence[float]] = field(default_factory=dict, init=False)  # of the recipe's reference

    def own_settings(self) -> dict[str, Any]:
        """Return the objective's options, all of them, and the digest of another model that is the reference."""
        other = self.training.reference
        return {"options": self._objective[1]} | ({} if other is None else {"reference's weights": identity(other)})

    def rows(self) -> TokenRows:
        """Return the rows as tokens.

        Raises:
            UsageError: there is none, or the objective can't take them.
        """
        objective, _ = self._objective
        data = preference_rows(self.rows_path, ChatTemplate(tokenizer_of(self.start)), self.limits, objective.own)
        wrong = [row for row in data.rows if row.roles[-2] != "target" or "target" in row.roles[:-2]]
        if objective.fuses and (wrong or len(data.rows[0].roles) < 3):
            roles = ", ".join((wrong or data.rows)[0].roles[:-1])
            raise UsageError(
                f"{objective.name} needs sources' chosen responses and one of the target in every row of "
                f"{self.rows_path}, got {roles}. Pair with the rule wrpo, or use another objective."
            )
        return data

    def prepare(self, rows: Sequence[TrainingRow], args: TrainingArguments, reporter: Reporter) -> None:
        """Compute s_ref under another model than the one that training starts from, where the recipe names it."""
        other, size = self.training.reference, args.per_device_train_batch_size
        if other is not None:
            folder = self.workspace.root / "reference"
            self._references = filled_by(other, self.training, rows, size, folder, reporter)
        elif self._objective[0].rounds:
            what = f"{self.name}: {self.training.objective} has one reference, the model that it starts from"
            reporter.line(f"{what}: right in a first round; in later ones name the first model as `reference`")

    def new_trainer(self, args: TrainingArguments, rows: OrderedRows) -> ResponseTrainer:
        """Load the model, and return what trains it on rows in their order."""
        from mergekit_lite.distillation.training.preference_trainer import PreferenceTrainer

        objective, options = self._objective
        mixture = None
        if objective.mixes and options["mix"] != 1:
            reference = frozen_model(self.training.reference or self.start, self.training, args.device)
            mixture = Mixture(reference, options["mix"])
        model = trained_model(self.start, self.training, dropout=False, seed=self.seed, mixture=mixture)
        return PreferenceTrainer(model, args, rows, self.workspace.log, objective, options)

    def begin(self, trainer: ResponseTrainer, rows: Sequence[TrainingRow], reporter: Reporter) -> None:
        """Give the trainer s_ref and s_t, as far as the objective needs them."""
        from mergekit_lite.distillation.training.preference_trainer import PreferenceTrainer

        assert isinstance(trainer, PreferenceTrainer)
        objective, is_reference = trainer.objective, self.training.reference is None
        start: Mapping[str, Sequence[float]] = {}
        if objective.rounds or (objective.reference and is_reference):
            folder = self.workspace.root / ("reference" if is_reference else "round")
            size = trainer.args.per_device_train_batch_size
            start = filled(trainer.start_log_probs, rows, size, folder, reporter)
        trainer.reference, trainer.round = start if is_reference else self._references, start

    @cached_property
    def _objective(self) -> tuple[Objective, dict[str, Any]]:
        problems: list[str] = []
        objective = objective_of(self.training, problems)
        if objective is None or problems:
            raise UsageError(listing("The objective can't be used", problems))
        return objective
