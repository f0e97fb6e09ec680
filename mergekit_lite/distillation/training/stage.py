"""A training, from rows to a published model: SFT, and what all trainings share. Others override parts of it."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_lite.answers.template import ChatTemplate, LengthLimits
from mergekit_lite.distillation.recipe.schema import Training
from mergekit_lite.distillation.reporter import Advance, Reporter
from mergekit_lite.distillation.training import deepspeed, held_out, watch
from mergekit_lite.distillation.training.arguments import Length, length, processes, training_arguments
from mergekit_lite.distillation.training.held_out import Split
from mergekit_lite.distillation.training.model import (
    check_whole_model,
    layout_of,
    tokenizer_of,
    trained_model,
    write_model,
)
from mergekit_lite.distillation.training.rows import TokenRows, TrainingRow, order, sft_rows
from mergekit_lite.distillation.training.soundness import check_sound
from mergekit_lite.distillation.training.watch import DivergedError
from mergekit_lite.distillation.training.workspace import Workspace, digest_of, flat, identity
from mergekit_lite.errors import MergekitLiteError, RunError, UsageError, counted, listing

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from mergekit_lite.distillation.training.trainer import OrderedRows, ResponseTrainer

# Settings that a resumed run may change: they affect the last bits of the result at most.
FREE = {
    *("per_device_batch_size", "gradient_checkpointing", "packing", "attn_implementation"),
    *("save_steps", "eval_steps", "log_to"),
}
# Defaults of settings that earlier versions didn't have, which are told only where they differ: their runs go on.
LATER: dict[str, Any] = {
    **{"eval": 0, "keep": "last", "options.nll": 0.0, "reference": None, "in_order": False},
    **{"noise": None, "unlikelihood": None},
    **{"lora.rslora": False, "lora.dora": False, "lora.modules_to_save": [], "lora.base": None},
}
NOISY = ("transformers", "accelerate", "DeepSpeed")  # loggers whose warnings say nothing that a user can act on


@dataclass
class TrainingStage:
    """One training."""

    name: str  # the folder that it makes is called so
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
    def limits(self) -> LengthLimits:
        """The largest length of a row."""
        return LengthLimits(self.training.max_length, self.training.max_prompt_length, self.training.too_long)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return bool(processes(self.training).is_main_process)

    def run(self, reporter: Reporter) -> None:
        """Train to the published folder, resuming an earlier run; do nothing if that folder exists.

        Raises:
            UsageError: the rows can't be trained on as the recipe says, or the folder holds another training.
            RunError: the training diverged, or what it made, now or earlier, is not sound.
        """
        atexit.unregister(_part)
        with _quiet():
            self._run(reporter)
        atexit.register(_part)

    def _run(self, reporter: Reporter) -> None:
        settings = self.settings()
        self.workspace.check(settings)
        if self.final.exists():
            self._accept(reporter)
            return
        data = self.rows()
        parts = held_out.split(data.rows, self.training, self.seed, self.name)
        planned = length(self.training, len(parts.trained))
        args = training_arguments(self.training, self.workspace.root, planned.steps, self.seed)
        reporter = reporter if self.is_main else Reporter()
        self._report_rows(data, parts, planned, reporter)
        self._fit(args, reporter)
        done, checkpoint = self.workspace.last_checkpoint() or (0, None)
        if done:
            reporter.line(f"{self.name}: goes on after step {done:,} of {planned.steps:,}")
        wait_for_everyone()  # all processes must read the folder before one changes it
        record = self._record(settings, data, parts, planned, args)
        if self.is_main:
            self.workspace.begin(record, done)
        self.prepare(data.rows, args, reporter)
        trainer = self._trainer(args, parts, planned, reporter)
        with reporter.progress(f"train {self.name}", planned.steps, done) as advance:
            trainer.add_callback(self._callback(trainer, data.rows, reporter, advance))
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except DivergedError as error:
                raise RunError(self._diverged(error)) from error
        self._publish(trainer, record, reporter)
        reporter.line(f"{self.name}: {counted(planned.steps, 'step')} done, {self.final}")

    def _accept(self, reporter: Reporter) -> None:
        """Take the finished folder as it is, once it is checked."""
        self.together(self._check_earlier)
        if self.is_main:
            self.workspace.tidy()
            reporter.line(f"{self.name}: done, {self.final}")

    def _check_earlier(self) -> None:
        """Check a finished folder that a version without a check has written."""
        if not self.workspace.is_checked:
            title = f"{self.final} was published by an earlier version, but is not sound"
            check_sound(self.final, title, "Move it away, or delete it, to train anew.")

    def _diverged(self, error: DivergedError) -> str:
        """Return the message about a training that diverged."""
        last = self.workspace.last_checkpoint()
        kept = (
            f"The last good checkpoint, after step {last[0]:,}, is kept: {last[1]}." if last else "No step was saved."
        )
        rate, warmup = self.training.learning_rate, self.training.warmup_ratio
        clip = self.training.trainer.get("max_grad_norm", 1.0)
        half = " float16 overflows beyond 65,504: try dtype: bfloat16." if self.training.dtype == "float16" else ""
        return (
            f"{self.name}: training diverged: {error}. It stopped there, and nothing is published. {kept}\n"
            f"Try a lower learning_rate (it is {rate:g}), a longer warmup_ratio ({warmup:g}), or a lower limit of the "
            f"gradient, trainer: {{max_grad_norm: 0.5}} (it is {clip:g}; 0 is no limit).{half}\n"
            f"With other settings training starts anew: delete {self.workspace.root}, or move it away. With the same "
            "ones it goes on after the last good checkpoint, and will most likely diverge again."
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide about the result, flat: a resumed run must have the same."""
        own = self.training.model_dump(mode="json", exclude=FREE)
        own |= self.own_settings()
        settings = {"start": self.start, "start's weights": identity(self.start), "seed": self.seed, **flat(own)}
        settings = {key: value for key, value in settings.items() if LATER.get(key, ...) != value}
        if self.rows_path.exists():
            settings["rows"] = digest_of(self.rows_path)
        return dict(json.loads(json.dumps(settings)))  # as read from a file: lists for tuples

    def own_settings(self) -> dict[str, Any]:
        """Return what decides about the result beside the training's keys, or in their place."""
        return {}

    def rows(self) -> TokenRows:
        """Return the rows as tokens.

        Raises:
            UsageError: there is none.
        """
        return sft_rows(self.rows_path, ChatTemplate(tokenizer_of(self.start)), self.limits)

    def prepare(self, rows: Sequence[TrainingRow], args: TrainingArguments, reporter: Reporter) -> None:
        """Do what has to be done before the model is loaded. Every process calls this."""

    def begin(self, trainer: ResponseTrainer, rows: Sequence[TrainingRow], reporter: Reporter) -> None:
        """Do what has to be done before the first step, with the model on its devices. Every process calls this."""

    def _report_rows(self, data: TokenRows, parts: Split, planned: Length, reporter: Reporter) -> None:
        for note in data.notes:
            reporter.warn(note)
        if data.problems:
            reporter.warn(listing(f"{self.name}: {counted(len(data.problems), 'row')} left out", data.problems))
        left = f"; {counted(planned.left, 'row')} fill no last batch" if planned.left else ""
        steps = f"{counted(planned.steps, 'step')} of {self.training.batch_size}"
        held = f"; {counted(parts.prompts, 'prompt')} with {counted(len(parts.held), 'row')} held out"
        what = f"{data.summary}{held if parts.held else ''}"
        reporter.line(f"{self.name}: {what}; {self.training.epochs:g} epochs in {steps}{left}")

    def _fit(self, args: TrainingArguments, reporter: Reporter) -> None:
        """Bring the launcher's settings in line with the recipe, and tell of devices that lie idle."""
        if remarks := deepspeed.fit(args):
            reporter.line(f"{self.name}: DeepSpeed is set up by the recipe: {', '.join(remarks)}")
        if args.world_size == 1 and torch.accelerator.device_count() > 1:
            reporter.warn("Only one of the devices is used. `accelerate launch -m mergekit_lite …` takes all.")

    @staticmethod
    def _record(
        settings: dict[str, Any], data: TokenRows, parts: Split, planned: Length, args: TrainingArguments
    ) -> dict[str, Any]:
        """Return what the published folder will say about its training."""
        versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
        record = {"rows": data.counts, "steps": planned.steps, "processes": args.world_size, "versions": versions}
        if parts.held:
            record["held out"] = {"prompts": parts.prompts, "rows": len(parts.held)}
        return {"settings": settings, **record}

    def new_trainer(self, args: TrainingArguments, rows: OrderedRows) -> ResponseTrainer:
        """Load the model, and return what trains it on rows in their order."""
        from mergekit_lite.distillation.training.trainer import SftTrainer

        model = trained_model(self.start, self.training, dropout=True, seed=self.seed)
        return SftTrainer(model, args, rows, self.workspace.log)

    def _trainer(self, args: TrainingArguments, parts: Split, planned: Length, reporter: Reporter) -> ResponseTrainer:
        from mergekit_lite.distillation.training.trainer import OrderedRows

        number = len(parts.trained)
        if self.training.in_order:
            places = [place % number for place in range(planned.rows)]
        else:
            places = order(number, planned.rows, self.seed, self.name)
        rows = OrderedRows(parts.trained, places)
        trainer = self.new_trainer(args, rows)
        trainer.held_out = parts.held
        plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
        if self.training.keep == "best" and plugin is not None and "FULL" not in str(plugin.state_dict_type):
            raise UsageError(
                f"train.{self.name}: keep: best needs whole checkpoints. Set fsdp_state_dict_type: FULL_STATE_DICT in "
                "the file of accelerate launch."
            )
        if self.training.packing and layout_of(trainer.model) == "padded":
            why = "this model, its attention or ZeRO-3 doesn't keep rows apart that lie end to end"
            reporter.line(f"{self.name}: rows are padded, as {why}")
        return trainer

    def _callback(self, trainer: ResponseTrainer, rows: list[TrainingRow], reporter: Reporter, advance: Advance) -> Any:
        from mergekit_lite.distillation.training.trainer import TrainingCallback

        often = self.training.eval_steps or self.training.save_steps
        best = self.training.keep == "best"

        def begin() -> None:
            check_whole_model(trainer.model)
            self.begin(trainer, rows, reporter)
            if trainer.held_out and not trainer.state.global_step:
                trainer.evaluate()

        def step(number: int, saved: bool) -> bool:
            trainer.check_step(number, saved)
            advance(1)
            wanted = number % often == 0 or number == trainer.state.max_steps or (saved and best)
            return bool(trainer.held_out) and wanted

        def logged(figures: Mapping[str, float]) -> None:
            if held_out.LOSS in figures:
                reporter.line(f"{self.name}: step {trainer.state.global_step:,}, {held_out.told(figures)}")
            elif "loss" in figures:
                advance(0, watch.told(figures))

        return TrainingCallback(begin, step, logged)

    def _publish(self, trainer: ResponseTrainer, record: dict[str, Any], reporter: Reporter) -> None:
        saved = self.workspace.root / "trained"
        if self.training.keep == "best":
            steps = self.workspace.checkpoints()
            choice = held_out.choose(self.workspace.log, steps)
            saved = steps[choice.step]
            reporter.line(f"{self.name}: {choice.told}: it is published")
            record["published"] = {"step": choice.step, "by": choice.by, "checkpoints": choice.figures}
        else:
            if trainer.is_fsdp_enabled:
                trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
            trainer.save_model(str(saved))
        trainer.accelerator.free_memory()
        deepspeed.forget()
        wait_for_everyone()

        def write() -> None:
            write_model(saved, self.start, self.training, self.workspace.model)
            title = f"{self.name}: the written model is not sound, so it is not published"
            record["checked"] = check_sound(
                self.workspace.model, title, f"Checkpoints are kept in {self.workspace.root}."
            )
            self.workspace.publish(record)

        self.together(write)

    def together(self, work: Callable[[], None]) -> None:
        """Do in the main process what one must do for all, and raise its error in all of them."""
        from accelerate.utils import broadcast_object_list

        problem: list[MergekitLiteError | None] = [None]
        if self.is_main:
            try:
                work()
            except MergekitLiteError as error:
                problem = [error]
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise problem[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' chatter from the screen: the reporter shows progress, and our own checks say what is wrong.

    A FutureWarning is for who calls what will go: peft calls transformers so, DeepSpeed calls torch so in each step.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def wait_for_everyone() -> None:
    """Wait until all processes are here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def _part() -> None:
    """Leave the other processes, before Python ends.

    Gloo's threads free the tensors of the last exchange when they get to it, and need Python's lock for that. Where
    Python ends meanwhile, the process ends with SIGABRT ("terminate called without an active exception"). A group waits
    for its threads when it goes, which is when nobody has it any more: neither torch, nor the trainer, which is garbage
    by now but for its circles. After an error it isn't done: others may wait for this process, and NCCL for them.
    """
    if torch.distributed.is_initialized():
        deepspeed.part()
        gc.collect()
