"""A round: the student asked, its answers scored by the teachers, and the rows that the next steps are trained on."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.rows import Key, Prompt, seed_of
from mergekit_lite.distillation.objectives.on_policy import group_log_ratios, token_log_ratios
from mergekit_lite.distillation.on_policy.answers import (
    ANSWER,
    DRAWN,
    SCORED,
    OwnAnswer,
    OwnRow,
    RowFolder,
    answer_of,
    rounded,
)
from mergekit_lite.distillation.on_policy.lengths import Lengths
from mergekit_lite.distillation.on_policy.student import Student
from mergekit_lite.distillation.on_policy.teachers import Teacher
from mergekit_lite.distillation.recipe.schema import OnPolicy, RecipeTeacher
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.training.rows import TrainingRow, order
from mergekit_lite.errors import RunError, UsageError, counted, listing

if TYPE_CHECKING:
    from mergekit_lite.distillation.on_policy.trainer import OnPolicyTrainer
    from mergekit_lite.distillation.training.trainer import OrderedRows

STAGE = "on_policy"


class Plan(NamedTuple):
    """What each round has."""

    rounds: int
    prompts: int
    answers: int
    steps: int  # of the optimiser
    size: int  # rows of these steps, with repetitions

    @property
    def all_steps(self) -> int:
        """The steps of all rounds."""
        return self.rounds * self.steps


def planned(settings: OnPolicy, prompts: int) -> Plan:
    """Return what each round has, given the number of prompts.

    Raises:
        UsageError: there are fewer than a round takes, or their answers fill no batch.
    """
    taken = settings.prompts or prompts
    if not prompts or taken > prompts:
        raise UsageError(f"train.{STAGE}: {counted(taken, 'prompt')} in a round, and there are {prompts:,}.")
    answers = taken * settings.samples
    steps = int(settings.epochs * answers + 1e-9) // settings.batch_size
    if not steps:
        raise UsageError(
            f"train.{STAGE}: {counted(answers, 'answer')} in a round, {settings.epochs:g} times, don't fill a batch of "
            f"{settings.batch_size}. Set batch_size to {max(1, int(settings.epochs * answers))} at most."
        )
    return Plan(settings.rounds, taken, answers, steps, steps * settings.batch_size)


@dataclass
class Rounds:
    """The rounds of a training, as one of its processes makes them."""

    settings: OnPolicy
    plan: Plan
    prompts: Sequence[Prompt]
    prompt_tokens: Mapping[str, Any]  # arrays of ids, by the prompt
    student: Student
    teachers: Sequence[Teacher]
    trainer: OnPolicyTrainer
    folder: Path  # of the files of all rounds
    seed: int
    reporter: Reporter
    first: Lengths | None = None  # of the answers of the first round
    noted: Counter[str] = field(default_factory=Counter)  # notes about teachers' servers that were told
    told: set[str] = field(default_factory=set)  # signs of a collapse that were told, each once

    def begin(self, number: int) -> OrderedRows:
        """Return the rows of a round in the order of its steps. Every process must call this.

        What an earlier run has left in the round's files is taken as it is.

        Raises:
            RunError: answers or scores can't be had, or no answer can be learned from.
        """
        from mergekit_lite.distillation.training.trainer import OrderedRows

        tasks = self.tasks(number)
        prompts = {task.key: task.prompt for task in tasks}
        answers = self._answers(number, tasks)
        self._tell_lengths(number, answers)
        scores = {teacher.name: self._scores(number, teacher, prompts, answers) for teacher in self.teachers}
        usable, why = _usable(answers, prompts, scores, [teacher.settings for teacher in self.teachers])
        left = [f"{reason} ({count:,}×)" for reason, count in why.most_common()]
        if not usable:
            raise RunError(self._nothing_learnt(number, left))
        if why:
            self.reporter.warn(listing(f"{self._name(number)}: {counted(why.total(), 'answer')} left out", left))
        bare = [self._bare(answer) for answer in usable]
        places = order(len(bare), self.plan.size, self.seed, f"{STAGE} {number}")
        ordered = OrderedRows(bare, places)
        ordered.group(self.settings.batch_size)
        drawn = self._drawn(number, [answer.key for answer in usable], ordered)
        rows = [
            _row(
                row, drawn[answer.key], {name: of[answer.key] for name, of in scores.items() if answer.key in of}, self
            )
            if answer.key in drawn
            else row  # of no step
            for row, answer in zip(bare, usable, strict=True)
        ]
        return OrderedRows(rows, ordered.order)

    def _nothing_learnt(self, number: int, left: Sequence[str]) -> str:
        """Return the message about a round without an answer to learn from.

        To leave the round out would be steps without a gradient, of a student that has most likely collapsed.
        """
        heading = f"{self._name(number)}: none of its {counted(self.plan.answers, 'answer')} can be learnt from"
        teachers, partial = self._folder(number) / "teachers", self.folder.parent
        return listing(heading, left) + (
            "\nThe same command finds the same answers and reasons, and ends here again.\n"
            f"Where a teacher or its server is to blame, mend it and delete {teachers}: it is asked anew, and the "
            "training goes on.\n"
            "Where the student's answers are (empty, cut, nothing that a teacher's template may hold), look at those "
            f"of the rounds before in {self.folder}. Training must then begin anew, with a lower learning_rate or more "
            f"prompts a round: delete {partial}, or move it away. Its last checkpoint is the student as it was before."
        )

    def tasks(self, number: int) -> list[Task]:
        """Return the tasks of a round: the next prompts in an order that is drawn anew whenever all were asked."""
        start = number * self.plan.prompts
        places = order(len(self.prompts), start + self.plan.prompts, self.seed, STAGE)[start:]
        asked: Counter[str] = Counter()  # a prompt may be at the end of one order and at the beginning of the next
        tasks = []
        for place in places:
            prompt = self.prompts[place]
            first = asked[prompt.id]
            asked[prompt.id] += self.settings.samples
            for index in range(first, asked[prompt.id]):
                tasks.append(Task(prompt, index, seed_of(self.seed, STAGE, number, prompt.id, index)))
        return tasks

    def _answers(self, number: int, tasks: Sequence[Task]) -> list[OwnAnswer]:
        folder = RowFolder(self._folder(number) / "answers", ANSWER)
        known = folder.read()
        missing = frozenset(task.key for task in tasks if task.key not in known)
        self._wait()  # all processes must read the files before one appends
        if missing:
            done = len(tasks) - len(missing)
            with (
                self.reporter.progress(f"answers {number + 1}", len(tasks), done) as advance,
                folder.appending(self.rank) as append,
            ):
                for answers in self.student.answers(tasks, missing):
                    append(answer.as_row() for answer in answers)
                    advance(len(answers))
            self._wait()
            known = folder.read()
        if lost := [task.key for task in tasks if task.key not in known]:
            raise RunError(
                f"{self._name(number)}: {counted(len(lost), 'answer')} missing. The same command goes on and asks for "
                "what is missing."
            )
        return [answer_of(known[task.key]) for task in tasks]

    def _scores(
        self, number: int, teacher: Teacher, prompts: Mapping[Key, Prompt], answers: Sequence[OwnAnswer]
    ) -> dict[Key, dict[str, Any]]:
        folder = RowFolder(self._folder(number) / "teachers" / teacher.name, SCORED)
        known = folder.read()
        asked = [
            (prompts[answer.key], answer) for answer in answers if teacher.settings.teaches(prompts[answer.key].domain)
        ]
        missing = [each for each in asked if each[1].key not in known]
        self._wait()
        if missing:
            done = len(asked) - len(missing)
            with (
                self.reporter.progress(f"{teacher.name} {number + 1}", len(asked), done) as advance,
                folder.appending(self.rank) as append,
            ):
                try:
                    for rows in teacher.scored(missing[self.rank :: self.processes], advance):
                        append(rows)
                finally:
                    for note in teacher.scorer.notes[self.noted[teacher.name] :]:
                        self.reporter.line(f"{teacher.name}: {note}")
                    self.noted[teacher.name] = len(teacher.scorer.notes)
            self._wait()
            known = folder.read()
        return known

    def _drawn(self, number: int, keys: Sequence[Key], rows: OrderedRows) -> dict[Key, Tensor]:
        """Return log π₀ of the rows that steps take, in the batches in which they take them first."""
        folder = RowFolder(self._folder(number) / "drawn", DRAWN)
        known = folder.read()
        size = self.trainer.args.per_device_train_batch_size
        batches = [rows.order[start : start + size] for start in range(0, len(rows.order), size)]
        missing: list[tuple[int, Sequence[int], list[int]]] = []  # process, places of the batch, of those to keep
        taken = {place for place, key in enumerate(keys) if key in known}
        for at, batch in enumerate(batches):
            new = [place for place in dict.fromkeys(batch) if place not in taken]
            taken.update(new)
            if new:
                missing.append((at % self.processes, batch, new))
        self._wait()
        if missing:
            total = sum(len(new) for _, _, new in missing)
            with (
                self.reporter.progress(f"log-probabilities {number + 1}", total) as advance,
                folder.appending(self.rank) as append,
            ):
                for owner, batch, new in missing:
                    if owner == self.rank:
                        found = dict(zip(batch, self.trainer.log_probs([rows.rows[at] for at in batch]), strict=True))
                        append(
                            {"prompt": keys[at].prompt, "index": keys[at].number, "log_probs": rounded(found[at])}
                            for at in new
                        )
                    advance(len(new))
            self._wait()
            known = folder.read()
        return {key: torch.tensor(known[key]["log_probs"], dtype=torch.float32) for key in keys if key in known}

    def _bare(self, answer: OwnAnswer) -> TrainingRow:
        prompt = self.prompt_tokens[answer.key.prompt]
        return TrainingRow(prompt, (array("i", answer.tokens),), ("target",))

    def _tell_lengths(self, number: int, answers: Sequence[OwnAnswer]) -> None:
        """Report the lengths of a round's answers, and warn of each kind of sign that they collapse, once."""
        lengths = Lengths.of(answers)
        if self.first is None:
            earlier = RowFolder(self._folder(0) / "answers", ANSWER).read().values() if number else ()
            self.first = Lengths.of(map(answer_of, earlier)) if earlier else lengths
        name = self._name(number)
        mean = f"{lengths.mean:,.0f} tokens in the mean, {lengths.cut:.0%} cut"
        self.reporter.line(f"{name}: {counted(lengths.answers, 'answer')} of {mean}")
        signs = lengths.signs(self.first, self.settings.sampling.max_tokens)
        if new := [sign for kind, sign in signs.items() if kind not in self.told]:
            self.reporter.warn(listing(f"{name}: look at the lengths of the answers", new))
        self.told.update(signs)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return int(self.trainer.accelerator.process_index)

    @property
    def processes(self) -> int:
        """How many there are."""
        return int(self.trainer.accelerator.num_processes)

    def _wait(self) -> None:
        self.trainer.accelerator.wait_for_everyone()

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number + 1:04}"

    def _name(self, number: int) -> str:
        return f"{STAGE}: round {number + 1:,} of {self.plan.rounds:,}"


def _usable(
    answers: Sequence[OwnAnswer],
    prompts: Mapping[Key, Prompt],
    scores: Mapping[str, Mapping[Key, Mapping[str, Any]]],
    teachers: Sequence[RecipeTeacher],
) -> tuple[list[OwnAnswer], Counter[str]]:
    """Return the answers that all of their teachers have scored, and why others were not, with counts."""
    usable, why = [], Counter[str]()
    for answer in answers:
        domain = prompts[answer.key].domain
        taught = [each.name for each in teachers if each.teaches(domain)]
        reasons = [f"{name}: {reason}" for name in taught if (reason := scores[name][answer.key].get("why"))]
        if reasons:
            why[reasons[0]] += 1
        else:
            usable.append(answer)
    return usable, why


def _row(bare: TrainingRow, drawn: Tensor, scores: Mapping[str, Mapping[str, Any]], rounds: Rounds) -> OwnRow:
    """Return a row with log π₀ and the log-ratio of each of its tokens."""
    ratios = {name: _log_ratios(drawn, score, rounds.settings) for name, score in scores.items()}
    mean = torch.stack(list(ratios.values())).double().mean(0).float()
    return OwnRow(
        prompt=bare.prompt, answers=bare.answers, roles=bare.roles, drawn=drawn, log_ratios=mean, by_teacher=ratios
    )


def _log_ratios(drawn: Tensor, score: Mapping[str, Any], settings: OnPolicy) -> Tensor:
    teacher = torch.tensor(score["log_probs"], dtype=torch.float64)
    if "groups" not in score:
        return token_log_ratios(drawn.double(), teacher).float()
    groups = torch.tensor(score["groups"])
    return group_log_ratios(drawn.double(), groups, teacher, settings.spread).float()
