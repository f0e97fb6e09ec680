"""SFT or preference training, from rows to a published model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_lite.answers.template import ChatTemplate, LengthLimits
from mergekit_lite.distillation.objectives import OBJECTIVES, Objective
from mergekit_lite.distillation.recipe.schema import Preference, Training
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.training import reference
from mergekit_lite.distillation.training.arguments import Length, length, training_arguments
from mergekit_lite.distillation.training.model import layout_of, tokenizer_of, trained_model, write_model
from mergekit_lite.distillation.training.rows import TokenRows, order, preference_rows, sft_rows
from mergekit_lite.distillation.training.workspace import Workspace, digest_of, flat, identity
from mergekit_lite.errors import UsageError, counted, listing, nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from mergekit_lite.distillation.training.trainer import ResponseTrainer

# Settings that a resumed run may change: they affect the last bits of the result at most.
FREE = {"per_device_batch_size", "gradient_checkpointing", "save_steps", "log_to", "packing", "attn_implementation"}
# Defaults of settings that came later than others: runs from before go on.
LATER = {"options.nll": 0.0, "lora.rslora": False, "lora.dora": False, "lora.modules_to_save": [], "lora.base": None}


def objective_of(training: Preference, problems: list[str]) -> tuple[Objective, dict[str, Any]] | None:
    """Return the objective of a training and all of its options; mistakes become problems."""
    objective = OBJECTIVES.get(training.objective)
    if objective is None:
        hint = nearest(training.objective, OBJECTIVES) or f" There are: {', '.join(OBJECTIVES)}."
        problems.append(f"train.preference: there is no objective {training.objective!r}.{hint}")
        return None
    return objective, objective.options(training.options, problems)


@dataclass
class TrainingStage:
    """One of the two trainings."""

    name: str  # sft or preference
    training: Training
    start: str  # the model it starts from: a folder or a name on the hub
    rows_path: Path
    final: Path  # the folder of the finished model
    seed: int  # of the order of rows, dropout and adapters

    @cached_property
    def workspace(self) -> Workspace:
        """The folder of the unfinished training."""
        return Workspace(self.final)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        from accelerate import PartialState

        return bool(PartialState().is_main_process)

    def run(self, reporter: Reporter) -> None:
        """Train to the published folder, resuming an earlier run; do nothing if that folder exists.

        Raises:
            UsageError: the rows can't be trained on as the recipe says, or the folder holds another training.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the reporter shows progress
        settings = self.settings()
        self.workspace.check(settings)
        if self.final.exists():
            if self.is_main:
                self.workspace.tidy()
                reporter.line(f"{self.name}: done, {self.final}")
            return
        data = self.rows()
        planned = length(self.training, len(data.rows))
        args = training_arguments(self.training, self.workspace.root, planned.steps, self.seed)
        reporter = reporter if self.is_main else Reporter()
        self._report_rows(data, planned, reporter)
        if args.world_size == 1 and torch.accelerator.device_count() > 1:
            reporter.warn("Only one of the devices is used. `accelerate launch -m mergekit_lite …` takes all.")
        done, checkpoint = self.workspace.last_checkpoint() or (0, None)
        if done:
            reporter.line(f"{self.name}: goes on after step {done:,} of {planned.steps:,}")
        _wait_for_everyone()  # all processes must read the folder before one changes it
        if self.is_main:
            versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
            record = {"rows": data.counts, "steps": planned.steps, "processes": args.world_size, "versions": versions}
            self.workspace.begin({"settings": settings, **record}, done)
        trainer = self._trainer(args, data, planned)
        if self.training.packing and layout_of(trainer.model) == "padded":
            why = "this model, or its attention, doesn't keep rows apart that lie end to end"
            reporter.line(f"{self.name}: rows are padded, as {why}")
        with reporter.progress(f"train {self.name}", planned.steps, done) as advance:
            trainer.add_callback(self._callback(trainer, data, reporter, advance))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self._publish(trainer)
        reporter.line(f"{self.name}: {counted(planned.steps, 'step')} done, {self.final}")

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide about the result, flat: a resumed run must have the same."""
        own = self.training.model_dump(mode="json", exclude=FREE)
        if isinstance(self.training, Preference):
            own["options"] = self._objective[1]
        settings = {"start": self.start, "start's weights": identity(self.start), "seed": self.seed, **flat(own)}
        settings = {key: value for key, value in settings.items() if LATER.get(key, ...) != value}
        if self.rows_path.exists():
            settings["rows"] = digest_of(self.rows_path)
        return dict(json.loads(json.dumps(settings)))  # as read from a file: lists for tuples

    def rows(self) -> TokenRows:
        """Return the rows as tokens.

        Raises:
            UsageError: there is none, or the objective can't take them.
        """
        template = ChatTemplate(tokenizer_of(self.start))
        limits = LengthLimits(self.training.max_length, self.training.max_prompt_length, self.training.too_long)
        if not isinstance(self.training, Preference):
            return sft_rows(self.rows_path, template, limits)
        data = preference_rows(self.rows_path, template, limits)
        wrong = [row for row in data.rows if row.roles[-2] != "target" or "target" in row.roles[:-2]]
        objective, _ = self._objective
        if objective.fuses and (wrong or len(data.rows[0].roles) < 3):
            roles = ", ".join((wrong or data.rows)[0].roles[:-1])
            raise UsageError(
                f"{objective.name} needs sources' chosen responses and one of the target in every row of "
                f"{self.rows_path}, got {roles}. Pair with the rule wrpo, or use another objective."
            )
        return data

    @cached_property
    def _objective(self) -> tuple[Objective, dict[str, Any]]:
        assert isinstance(self.training, Preference)
        problems: list[str] = []
        objective = objective_of(self.training, problems)
        if objective is None or problems:
            raise UsageError(listing("The objective can't be used", problems))
        return objective

    def _report_rows(self, data: TokenRows, planned: Length, reporter: Reporter) -> None:
        for note in data.notes:
            reporter.warn(note)
        if data.problems:
            reporter.warn(listing(f"{self.name}: {counted(len(data.problems), 'row')} left out", data.problems))
        left = f"; {counted(planned.left, 'row')} fill no last batch" if planned.left else ""
        steps = f"{counted(planned.steps, 'step')} of {self.training.batch_size}"
        reporter.line(f"{self.name}: {data.summary}; {self.training.epochs:g} epochs in {steps}{left}")

    def _trainer(self, args: TrainingArguments, data: TokenRows, planned: Length) -> ResponseTrainer:
        from mergekit_lite.distillation.training.trainer import OrderedRows, PreferenceTrainer, SftTrainer

        by_preference = isinstance(self.training, Preference)
        model = trained_model(self.start, self.training, dropout=not by_preference, seed=self.seed)
        rows = OrderedRows(data.rows, order(len(data.rows), planned.rows, self.seed, self.name))
        if not by_preference:
            return SftTrainer(model, args, rows, self.workspace.log)
        objective, options = self._objective
        return PreferenceTrainer(model, args, rows, self.workspace.log, objective, options)

    def _callback(
        self, trainer: ResponseTrainer, data: TokenRows, reporter: Reporter, advance: Callable[[int], None]
    ) -> Any:
        from mergekit_lite.distillation.training.trainer import PreferenceTrainer, TrainingCallback

        def begin() -> None:
            if isinstance(trainer, PreferenceTrainer) and trainer.objective.reference:
                reference.fill(trainer, data.rows, self.workspace.root / "reference", reporter)

        return TrainingCallback(begin, lambda: advance(1))

    def _publish(self, trainer: ResponseTrainer) -> None:
        saved = self.workspace.root / "trained"
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(saved))
        trainer.accelerator.free_memory()
        _wait_for_everyone()
        if self.is_main:
            write_model(saved, self.start, self.training, self.workspace.model)
            self.workspace.publish()
        _wait_for_everyone()


def _wait_for_everyone() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()
