"""Training on teachers' distributions: one student of all teachers, or one of each, merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergekit_lite.answers.loading import CAUSAL, config_of
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.objectives.distance import Distance
from mergekit_lite.distillation.objectives.distances import DISTANCES
from mergekit_lite.distillation.objectives.targets import Targets
from mergekit_lite.distillation.recipe.fusing import merge_recipe, pivots
from mergekit_lite.distillation.recipe.schema import Fuse, Recipe, RecipeTeacher
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.teaching.files import TaughtFile
from mergekit_lite.distillation.teaching.shard import SUFFIX
from mergekit_lite.distillation.training.distances import distance_losses
from mergekit_lite.distillation.training.model import OWN_CODE, Distances, tokenizer_of, trained_model
from mergekit_lite.distillation.training.rows import TokenRows
from mergekit_lite.distillation.training.soundness import check_sound
from mergekit_lite.distillation.training.stage import TrainingStage, wait_for_everyone
from mergekit_lite.distillation.training.taught_rows import TaughtBy, taught_rows
from mergekit_lite.distillation.training.vocabularies import as_students, ends_of_turn, vocabulary_of
from mergekit_lite.distillation.training.workspace import identity
from mergekit_lite.errors import counted
from mergekit_lite.merging import merge

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from mergekit_lite.distillation.training.trainer import OrderedRows, ResponseTrainer

SHARDS = (f"*{SUFFIX}",)  # of a teacher's folder


@dataclass
class FuseStage(TrainingStage):
    """Training of one student on all its teachers."""

    training: Fuse
    teachers: Sequence[RecipeTeacher]
    taught: Path  # the folder of the teachers' folders

    def own_settings(self) -> dict[str, Any]:
        """Return the objective's options, all of them, and what teachers taught."""
        said = {each.name: identity(str(self.taught / each.name), SHARDS) for each in self.teachers}
        return {"options": self._options, "pairwise": None, "taught": said}

    def rows(self) -> TokenRows:
        """Return the rows that teachers teach.

        Raises:
            UsageError: there is none.
        """
        template = ChatTemplate(tokenizer_of(self.start))
        by_token = self._distance.by_token(self._options)
        return taught_rows(self.rows_path, template, self.limits, self._said, self.training.combine, by_token)

    def new_trainer(self, args: TrainingArguments, rows: OrderedRows) -> ResponseTrainer:
        """Load the model, and return what trains it on rows in their order."""
        from mergekit_lite.distillation.training.fuse_trainer import FuseTrainer

        model = trained_model(self.start, self.training, dropout=True, seed=self.seed, distances=self._distances())
        return FuseTrainer(model, args, rows, self.workspace.log, self._said, self.training.clm)

    def _distances(self) -> Distances:
        """Return the function that computes the distances to those teachers that have a say in a batch."""
        distance, options = self._distance, self._options
        student, how = tokenizer_of(self.start), self.training.vocabulary
        width = int(config_of(self.start, CAUSAL, OWN_CODE).get_text_config().vocab_size)
        vocabularies, ends = [], []
        for teacher, file in self._said:
            rows, tokenizer = (width, int(file.settings["vocabulary"])), tokenizer_of(teacher.model)
            vocabularies.append(vocabulary_of(distance, student, tokenizer, how, rows))
            ends.append(ends_of_turn(student, tokenizer))

        def compute(model: Any, batch: Any, taught: Sequence[tuple[int, Targets]]) -> tuple[Tensor, list[Tensor]]:
            known = [vocabularies[teacher] for teacher, _ in taught]
            targets = [
                as_students(said, distance, vocabulary, width, ends[teacher])
                for (teacher, said), vocabulary in zip(taught, known, strict=True)
            ]
            return distance_losses(model, batch, targets, distance, options, known)

        return compute

    @property
    def _distance(self) -> Distance:
        return DISTANCES[self.training.objective]

    @property
    def _options(self) -> dict[str, Any]:
        return self._distance.options(self.training.options, [])

    @cached_property
    def _said(self) -> list[TaughtBy]:
        return [TaughtBy(each, TaughtFile(self.taught / each.name)) for each in self.teachers]


@dataclass
class PairwiseStage(FuseStage):
    """FuseChat: a student of each teacher, beside the pivot where the target itself is among them, then their merge.

    The students are ``train/fuse-NAME``, all trained from the same start; what they are merged to is ``train/fuse``.
    """

    pivot: RecipeTeacher | None

    def own_settings(self) -> dict[str, Any]:
        """Return what a student's are, and how students are merged. Once they are, their folders may go."""
        recipe = self._merge_recipe()
        return super().own_settings() | {"pairwise": {key: recipe.get(key) for key in ("merge_method", "parameters")}}

    @cached_property
    def students(self) -> list[FuseStage]:
        """The training of each student. Of equal cross-entropies that of the pivot counts: it comes first."""
        alone = self.training.model_copy(update={"pairwise": None})
        others = [each for each in self.teachers if each != self.pivot]
        first = [] if self.pivot is None else [self.pivot]
        return [
            FuseStage(
                f"{self.name}-{each.name}",
                alone,
                self.start,
                self.rows_path,
                self.final.with_name(f"{self.final.name}-{each.name}"),
                self.seed,
                [*first, each],
                self.taught,
            )
            for each in others
        ]

    def _run(self, reporter: Reporter) -> None:
        settings = self.settings()
        self.workspace.check(settings)
        if self.final.exists():
            self._accept(reporter)
            return
        for student in self.students:
            student.run(reporter)
        wait_for_everyone()  # all processes must read the folder before one changes it
        self.together(lambda: self._merge(settings, reporter))
        if self.is_main:
            reporter.line(f"{self.name}: {counted(len(self.students), 'student')} merged, {self.final}")

    def _merge(self, settings: dict[str, Any], reporter: Reporter) -> None:
        merged = self.workspace.model
        self.workspace.root.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"settings": settings, "recipe": self._merge_recipe()}
        self.workspace.note(record)
        merge(self._merge_recipe(), merged, resume=True)
        record["checked"] = check_sound(
            merged, f"{self.name}: the merged model is not sound", "Delete it to merge anew."
        )
        self.workspace.publish(record)

    def _merge_recipe(self) -> dict[str, Any]:
        assert self.training.pairwise is not None
        students = [str(each.final) for each in self.students]
        return merge_recipe(self.training.pairwise, self.start, students, self.training.dtype)


def fuse_stage(recipe: Recipe, start: str) -> FuseStage:
    """Return the training of ``train.fuse`` from a model."""
    folder, fuse = Folder(recipe.folder), recipe.train.fuse
    assert fuse is not None
    own = next(iter(pivots(recipe)), None)
    common = ("fuse", fuse, start, folder.pairs("sft"), folder.trained("fuse"), recipe.seed)
    taught = folder.taught("any").parent
    if fuse.pairwise is None:
        return FuseStage(*common, recipe.teachers, taught)
    return PairwiseStage(*common, recipe.teachers, taught, own)
