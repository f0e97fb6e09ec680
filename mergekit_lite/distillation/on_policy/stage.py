"""``train.on_policy``, from prompts to a published model.

For the flow: ``check(recipe)`` of ``checks.py`` returns all problems before anything runs. After the training before it
is published, ``OnPolicyStage.of(recipe, start)`` with ``start`` that model's folder, or ``recipe.target``, and
``run(reporter)``, by every process of a launch; it skips what is done. It needs the recipe's prompts and no rows: where
the sample stage hasn't settled them, it does. ``planned(settings, prompts)`` of ``rounds.py`` has the numbers of a dry
run. The model is ``Folder.trained("on_policy")``; ``preference`` goes on from there.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from mergekit_lite.answers.asking import Respondent
from mergekit_lite.answers.rows import Prompt, with_system
from mergekit_lite.answers.template import ChatTemplate, TemplateError
from mergekit_lite.distillation import teach
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.on_policy.checks import prompt_limit
from mergekit_lite.distillation.on_policy.rounds import STAGE, Plan, Rounds, planned
from mergekit_lite.distillation.on_policy.student import (
    InTraining,
    OwnStudent,
    Student,
    WrittenStudent,
    leave_drawing_to_requests,
)
from mergekit_lite.distillation.on_policy.teachers import Teacher, teachers_of
from mergekit_lite.distillation.prompts import settled, stored
from mergekit_lite.distillation.recipe.schema import TARGET, OnPolicy, Recipe, RecipeSource
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.sample import respondent
from mergekit_lite.distillation.training.arguments import training_arguments
from mergekit_lite.distillation.training.deepspeed import is_partitioned
from mergekit_lite.distillation.training.model import answering, tokenizer_of, trained_model, write_model
from mergekit_lite.distillation.training.stage import TrainingStage, wait_for_everyone
from mergekit_lite.distillation.training.watch import DivergedError
from mergekit_lite.distillation.training.workspace import flat, identity
from mergekit_lite.errors import RunError, UsageError, counted, listing

if TYPE_CHECKING:
    from mergekit_lite.distillation.on_policy.trainer import OnPolicyTrainer

FREE = {
    "server",
    "served_model",
    "api_key_variable",
    "concurrency",
    "timeout",
    "retries",
    "batch_size",
    "device",
    "top",
}


@dataclass
class OnPolicyStage(TrainingStage):
    """On-policy distillation of a recipe."""

    recipe: Recipe

    @classmethod
    def of(cls, recipe: Recipe, start: str) -> OnPolicyStage:
        """Return the stage that goes on from a model: a folder, or a name on the hub."""
        folder = Folder(recipe.folder)
        assert recipe.train.on_policy is not None
        return cls(STAGE, recipe.train.on_policy, start, folder.prompts, folder.trained(STAGE), recipe.seed, recipe)

    @property
    def own(self) -> OnPolicy:
        """The settings."""
        assert isinstance(self.training, OnPolicy)
        return self.training

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide about the result, flat: prompts as they are asked, teachers and weights."""
        settings = super().settings()
        settings.pop("rows", None)
        digest = xxh3_128()
        for prompt in stored(Folder(self.recipe.folder)):
            digest.update(repr((prompt.id, prompt.messages, prompt.domain)).encode())
        settings["asked"] = digest.hexdigest()
        if self._source.system is not None:
            settings["system"] = self._source.system
        for teacher in self.recipe.teachers:
            own = flat(teacher.model_dump(mode="json", exclude={"name", *FREE}, exclude_none=True))
            settings |= {f"teachers.{teacher.name}.{key}": value for key, value in own.items()}
            settings[f"teachers.{teacher.name}.weights"] = identity(teacher.model)
        return settings

    def _run(self, reporter: Reporter) -> None:
        reporter = reporter if self.is_main else Reporter()
        self._settle(reporter)
        settings = self.settings()
        self.workspace.check(settings)
        if self.final.exists():
            self._accept(reporter)
            return
        teach.check(self.recipe)
        template = ChatTemplate(tokenizer_of(self.start))
        prompts, tokens = self._prompts(template, reporter)
        plan = planned(self.own, len(prompts))
        self._report(plan, len(prompts), reporter)
        args = training_arguments(self.training, self.workspace.root, plan.all_steps, self.seed)
        self._fit(args, reporter)
        done, checkpoint = self.workspace.last_checkpoint() or (0, None)
        if done:
            reporter.line(f"{self.name}: goes on after step {done:,} of {plan.all_steps:,}")
        wait_for_everyone()  # all processes must read the folder before one changes it
        versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
        rows = {"prompts": len(prompts), "rounds": plan.rounds, "answers": plan.rounds * plan.answers}
        record = {
            "settings": settings,
            "rows": rows,
            "steps": plan.all_steps,
            "processes": args.world_size,
            "versions": versions,
        }
        if self.is_main:
            self.workspace.begin(record, done)
        trainer = self._on_policy_trainer(args, plan)
        teachers = teachers_of(self.recipe.teachers, template)
        self._report_teachers(teachers, reporter)
        rounds = Rounds(
            self.own,
            plan,
            prompts,
            tokens,
            self._student(trainer, template),
            teachers,
            trainer,
            self.workspace.root / "rounds",
            self.seed,
            reporter,
        )
        trainer.begin = rounds.begin
        with reporter.progress(f"train {self.name}", plan.all_steps, done) as advance:
            trainer.add_callback(self._callback(trainer, [], reporter, advance))
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except DivergedError as error:
                raise RunError(self._diverged(error)) from error
        self._publish(trainer, record, reporter)
        reporter.line(f"{self.name}: {counted(plan.all_steps, 'step')} done, {self.final}")

    def _settle(self, reporter: Reporter) -> None:
        """Write the recipe's prompts to its folder, unless they are there."""

        def write() -> None:
            if not Folder(self.recipe.folder).prompts.exists():
                settled(self.recipe, reporter)

        self.together(write)

    def _prompts(self, template: ChatTemplate, reporter: Reporter) -> tuple[list[Prompt], dict[str, array[int]]]:
        """Return the prompts to ask, and the tokens of each.

        Raises:
            UsageError: there is none.
        """
        kept: list[Prompt] = []
        tokens: dict[str, array[int]] = {}
        why: Counter[str] = Counter()
        limit = prompt_limit(self.own)
        for prompt in stored(Folder(self.recipe.folder)):
            if not any(teacher.teaches(prompt.domain) for teacher in self.recipe.teachers):
                why[f"no teacher teaches the domain {prompt.domain!r}"] += 1
                continue
            try:
                ids = template.prompt(with_system(prompt.messages, self._source.system))
            except TemplateError as error:
                why[str(error)] += 1
                continue
            if len(ids) > limit:
                why[f"longer than {counted(limit, 'token')}"] += 1
                continue
            kept.append(prompt)
            tokens[prompt.id] = array("i", ids)
        reasons = [f"{reason} ({count:,}×)" for reason, count in why.most_common()]
        if not kept:
            raise UsageError(listing(f"train.{STAGE}: no prompt can be asked", reasons))
        if why:
            reporter.warn(listing(f"{self.name}: {counted(why.total(), 'prompt')} left out", reasons))
        for note in template.notes:
            reporter.line(note)
        return kept, tokens

    def _report(self, plan: Plan, prompts: int, reporter: Reporter) -> None:
        own = self.own
        unused = own.epochs * plan.answers - plan.size
        left = f"; {counted(int(unused), 'answer')} of a round fill no last batch" if unused >= 1 else ""
        reporter.line(
            f"{self.name}: {counted(prompts, 'prompt')}; {counted(plan.rounds, 'round')} of "
            f"{counted(plan.prompts, 'prompt')} × {own.samples}, {counted(plan.steps, 'step')} of {own.batch_size} "
            f"each{left}"
        )
        sampling = own.sampling
        warped = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": None, "repetition_penalty": 1.0}
        changed = [key for key, neutral in warped.items() if getattr(sampling, key) != neutral]
        if changed:
            reporter.warn(
                f"{self.name}: with {', '.join(changed)} in its sampling the student draws from another distribution "
                "than the one that is trained: the gradient is biased towards what it draws more often."
            )

    def _report_teachers(self, teachers: list[Teacher], reporter: Reporter) -> None:
        for teacher in teachers:
            how = "reads the student's tokens" if teacher.shares_tokens else "has a tokenizer of its own: chunks"
            reporter.line(f"{self.name}: {teacher.name} {how}")

    def _on_policy_trainer(self, args: Any, plan: Plan) -> OnPolicyTrainer:
        from mergekit_lite.distillation.on_policy.trainer import OnPolicyTrainer, Places

        model = trained_model(self.start, self.training, dropout=False, seed=self.seed)
        places = Places(plan.rounds, plan.size)
        names = [teacher.name for teacher in self.recipe.teachers]
        trainer = OnPolicyTrainer(model, args, places, self.workspace.log, self.own, names)
        if is_partitioned(model) or trainer.is_fsdp_enabled:
            raise UsageError(
                f"train.{STAGE}: the student answers whole, and FSDP or ZeRO-3 shares its weights out. Use one process "
                "a device with the whole model (with `lora`, if it doesn't fit), or ZeRO-1 or 2."
            )
        return trainer

    @property
    def _source(self) -> RecipeSource:
        return self.recipe.target_source or RecipeSource(name=TARGET, model=TARGET)

    def _student(self, trainer: OnPolicyTrainer, template: ChatTemplate) -> Student:
        source, accelerator = self._source, trainer.accelerator

        @contextmanager
        def lend() -> Iterator[Any]:
            with accelerator.autocast(), answering(accelerator.unwrap_model(trainer.model)) as model:
                yield model

        def write(folder: Path) -> None:
            saved = self.workspace.root / "asked"
            trainer.save_model(str(saved))

            def finish() -> None:
                write_model(saved, self.start, self.training, folder)
                leave_drawing_to_requests(folder)

            self.together(finish)

        def ask(folder: str) -> AbstractContextManager[Respondent]:
            changes = {"sampling": self.own.sampling, "name": STAGE}
            if source.server is None:
                changes["model"] = folder
            return respondent(self.recipe, source.model_copy(update=changes))

        if source.is_served:
            writes = None if source.server is not None else write
            folder = self.workspace.root / "answering"
            return WrittenStudent(writes, folder, ask, template, source.system, self.is_main)
        local = InTraining(
            TARGET, self.start, self.own.sampling, system=source.system, batch_size=source.batch_size, lend=lend
        )
        return OwnStudent(local, accelerator.process_index, accelerator.num_processes)
