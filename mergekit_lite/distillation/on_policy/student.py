"""The student asked for answers, as it is at the beginning of a round."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.local import Draw, Local, ReadyModel, ready
from mergekit_lite.answers.rows import Answer, Key, with_system
from mergekit_lite.answers.template import ChatTemplate, TemplateError
from mergekit_lite.answers.thoughts import Parts, together
from mergekit_lite.distillation.on_policy.answers import OwnAnswer
from mergekit_lite.errors import RunError, counted

Lend = Callable[[], AbstractContextManager[Any]]  # gives the model in training meanwhile, ready to generate


class Student(Protocol):
    """The student, asked by each process of a training for its share of the answers."""

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[list[OwnAnswer]]:
        """Yield those of the ``wanted`` answers to the ``tasks`` that are this process's to draw, as they come."""


@dataclass(eq=False)
class InTraining(Local):
    """The model in training, answering in this process; ``path`` is the model that training started from."""

    lend: Lend | None = None
    model: Any = None  # while it is lent

    @cached_property
    def loaded(self) -> ReadyModel:
        """The model, ready to answer."""
        return ready(self.model, self.tokenizer, self.sampling)


@dataclass(frozen=True)
class OwnStudent:
    """Draws in this process: the processes of a training take the batches in turn."""

    local: InTraining
    rank: int
    processes: int

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[list[OwnAnswer]]:
        """Yield the answers batch by batch.

        Raises:
            RunError: a batch doesn't fit into memory.
        """
        assert self.local.lend is not None
        with self.local.lend() as self.local.model:
            self.local.__dict__.pop("loaded", None)
            for number in range(self.rank, -(-len(tasks) // self.local.batch_size), self.processes):
                yield [_own(draw) for draw in self.local.draws(tasks, wanted, number)]


@dataclass(frozen=True)
class WrittenStudent:
    """Has the student written as a model folder and answer from there, by a server that is started over it or by vLLM.

    Where a server runs already, it answers as it is. Only the main process asks. What it says is text, tokenised anew
    as the chat template writes it: seldom, it was drawn in other tokens, whose likelihood is not looked at.
    """

    write: Callable[[Path], None] | None  # writes the model in training to a folder; None where a server runs already
    folder: Path  # to write it to, meanwhile
    respondent: Callable[[str], AbstractContextManager[Any]]  # of a model's folder
    template: ChatTemplate
    system: str | None
    is_main: bool

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[list[OwnAnswer]]:
        """Yield the answers one by one.

        Raises:
            RunError: the server doesn't start, or gives no answer to some.
        """
        if self.write is not None:
            self.write(self.folder)  # all processes
        if not self.is_main:
            return
        by_key = {task.key: task for task in tasks}
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            who = stack.enter_context(self.respondent(str(self.folder)))
            for answer in who.answers(tasks, wanted):
                yield [self._own(by_key[answer.key], answer)]
        failures = who.failures
        if failures.stopped or failures.lost:
            why = failures.stopped or f"{counted(len(failures.lost), 'answer')}: {next(iter(failures.lost.values()))}"
            raise RunError(f"The student gave no answer. {why}\nThe same command goes on and asks for what is missing.")

    def _own(self, task: Task, answer: Answer) -> OwnAnswer:
        parts = Parts("", answer.text) if not answer.thoughts else together(answer.thoughts, answer.text)
        text, cut = parts.whole, answer.finish == "length" or parts.open
        try:
            tokens = self.template.tokens(with_system(task.prompt.messages, self.system), text, cut=cut).response
        except TemplateError:
            tokens = ()  # it is empty: nothing to learn from
        return OwnAnswer(answer.key, text, "length" if cut else "stop", tokens)


def leave_drawing_to_requests(folder: Path) -> None:
    """Keep only tokens in a written model's generation configuration.

    vLLM and SGLang take what a request doesn't say from there, such as top-k 20 of Qwen3, and the student would draw
    from another distribution than its own.
    """
    path = folder / "generation_config.json"
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key.endswith("_token_id")}
        path.write_text(json.dumps(kept), encoding="utf-8")


def _own(draw: Draw) -> OwnAnswer:
    return OwnAnswer(draw.answer.key, draw.answer.text, draw.answer.finish, draw.tokens)
