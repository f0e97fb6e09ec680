"""One training, from rows to a published model."""

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
from mergekit_lite.distillation.recipe import Preference, Training
from mergekit_lite.distillation.reporter import Silent
from mergekit_lite.distillation.training import reference
from mergekit_lite.distillation.training.arguments import Course, course, training_arguments
from mergekit_lite.distillation.training.model import tokenizer_of, trained_model, write_model
from mergekit_lite.distillation.training.rows import Rows, order, preference_rows, sft_rows, told
from mergekit_lite.distillation.training.workspace import Workspace, digest_of, flat, identity
from mergekit_lite.errors import UsageError, counted, listing, nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from mergekit_lite.distillation.reporter import Tell
    from mergekit_lite.distillation.training.trainer import ResponseTrainer

# What changes nothing about the result but its last bits, or only what is told of it.
FREE = {"per_device_batch_size", "gradient_checkpointing", "save_steps", "log_to"}


def objective_of(training: Preference, problems: list[str]) -> tuple[Objective, dict[str, Any]] | None:
    """The objective and all of its options; what is wrong goes to ``problems``."""
    objective = OBJECTIVES.get(training.objective)
    if objective is None:
        hint = nearest(training.objective, OBJECTIVES) or f" There are: {', '.join(OBJECTIVES)}."
        problems.append(f"train.preference: there is no objective {training.objective!r}.{hint}")
        return None
    return objective, objective.options(training.options, problems)


@dataclass
class Stage:
    """One of the two trainings.

    Attributes:
        name: ``sft`` or ``preference``.
        training: of the recipe.
        start: the model it starts from, a folder or a name on the hub.
        rows_path: the file of its rows.
        final: the folder of the finished model.
        seed: of the order of rows, dropout and adapters.
    """

    name: str
    training: Training
    start: str
    rows_path: Path
    final: Path
    seed: int

    @cached_property
    def workspace(self) -> Workspace:
        """The folder while it is trained."""
        return Workspace(self.final)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and tells."""
        from accelerate import PartialState

        return bool(PartialState().is_main_process)

    def run(self, tell: Tell) -> None:
        """Train from where it stopped to the published folder, unless that is there.

        Raises:
            UsageError: the rows can't be trained on as the recipe says, or the folder holds another training.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the stage tells
        settings = self.settings()
        self.workspace.check(settings)
        if self.workspace.done:
            if self.is_main:
                self.workspace.tidy()
                tell.line(f"{self.name}: done, {self.final}")
            return
        found = self.rows()
        plan = course(self.training, len(found.rows))
        args = training_arguments(self.training, self.workspace.root, plan.steps, self.seed)
        tell = tell if self.is_main else Silent()
        self._tell_rows(found, plan, tell)
        if args.world_size == 1 and torch.accelerator.device_count() > 1:
            tell.warn("Only one of the devices is used. `accelerate launch -m mergekit_lite …` takes all.")
        done, checkpoint = self.workspace.last_checkpoint() or (0, None)
        if done:
            tell.line(f"{self.name}: goes on after step {done:,} of {plan.steps:,}")
        _together()  # all processes have looked before one changes anything
        if self.is_main:
            versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
            record = {"rows": found.counts, "steps": plan.steps, "processes": args.world_size, "versions": versions}
            self.workspace.begin({"settings": settings, **record}, done)
        trainer = self._trainer(args, found, plan)
        with tell.progress(f"train {self.name}", plan.steps, done) as more:
            trainer.add_callback(self._hook(trainer, found, tell, more))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self._publish(trainer)
        tell.line(f"{self.name}: {counted(plan.steps, 'step')} done, {self.final}")

    def settings(self) -> dict[str, Any]:
        """What decides about the result, flat: a folder is held to it before anything goes on in it."""
        chosen = self.training.model_dump(mode="json", exclude=FREE)
        if isinstance(self.training, Preference):
            chosen["options"] = self._objective[1]
        settings = {"start": self.start, "start's weights": identity(self.start), "seed": self.seed, **flat(chosen)}
        if self.rows_path.exists():
            settings["rows"] = digest_of(self.rows_path)
        return dict(json.loads(json.dumps(settings)))  # as a file gives them back: lists for tuples

    def rows(self) -> Rows:
        """The rows as tokens.

        Raises:
            UsageError: there is none, or the objective can't take them.
        """
        template = ChatTemplate(tokenizer_of(self.start))
        limits = LengthLimits(self.training.max_length, self.training.max_prompt_length, self.training.too_long)
        if not isinstance(self.training, Preference):
            return sft_rows(self.rows_path, template, limits)
        found = preference_rows(self.rows_path, template, limits)
        wrong = [row for row in found.rows if row.roles[-2] != "target" or "target" in row.roles[:-2]]
        if self.training.objective == "wrpo" and (wrong or len(found.rows[0].roles) < 3):
            raise UsageError(
                f"wrpo needs sources' chosen responses and one of the target in every row of {self.rows_path}, got "
                f"{', '.join((wrong or found.rows)[0].roles[:-1])}. Pair with the rule wrpo, or use another objective."
            )
        return found

    @cached_property
    def _objective(self) -> tuple[Objective, dict[str, Any]]:
        assert isinstance(self.training, Preference)
        problems: list[str] = []
        found = objective_of(self.training, problems)
        if found is None or problems:
            raise UsageError(listing("The objective can't be used", problems))
        return found

    def _tell_rows(self, found: Rows, plan: Course, tell: Tell) -> None:
        for note in found.notes:
            tell.warn(note)
        if found.problems:
            tell.warn(listing(f"{self.name}: {counted(len(found.problems), 'row')} left out", found.problems))
        left = f"; {counted(plan.left, 'row')} fill no last batch" if plan.left else ""
        steps = f"{counted(plan.steps, 'step')} of {self.training.batch_size}"
        tell.line(f"{self.name}: {told(found.counts)}; {self.training.epochs:g} epochs in {steps}{left}")

    def _trainer(self, args: TrainingArguments, found: Rows, plan: Course) -> ResponseTrainer:
        from mergekit_lite.distillation.training.trainer import Places, PreferenceTrainer, SftTrainer

        prefers = isinstance(self.training, Preference)
        model = trained_model(self.start, self.training, dropout=not prefers, seed=self.seed)
        places = Places(found.rows, order(len(found.rows), plan.places, self.seed, self.name))
        epochs = plan.places / len(found.rows)
        if not prefers:
            return SftTrainer(model, args, places, self.workspace.log, epochs)
        objective, options = self._objective
        return PreferenceTrainer(model, args, places, self.workspace.log, epochs, objective, options)

    def _hook(self, trainer: ResponseTrainer, found: Rows, tell: Tell, more: Callable[[int], None]) -> Any:
        from mergekit_lite.distillation.training.trainer import Hook, PreferenceTrainer

        def begin() -> None:
            if isinstance(trainer, PreferenceTrainer) and trainer.objective.reference:
                reference.fill(trainer, found.rows, self.workspace.root / "reference", tell)

        return Hook(begin, lambda: more(1))

    def _publish(self, trainer: ResponseTrainer) -> None:
        """Write the model out of the trainer and give it its name."""
        saved = self.workspace.root / "trained"
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(saved))
        trainer.accelerator.free_memory()
        _together()
        if self.is_main:
            write_model(saved, self.start, self.training, self.workspace.model)
            self.workspace.publish()
        _together()


def _together() -> None:
    """Wait for all processes."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
