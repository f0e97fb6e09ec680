"""The contract of a respondent, which answers prompts: a server, or a model in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lite.answers.rows import Answer, Key, Prompt


class Sampling(BaseModel):
    """The settings by which answers are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: Annotated[float, Field(ge=0)] = 0.8  # 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 2048


@dataclass(frozen=True)
class Task:
    """One answer to ask for."""

    prompt: Prompt  # to answer
    index: int  # of the answer among those to this prompt, from 0
    seed: int  # of the draw

    @property
    def key(self) -> Key:
        """The key of its answer."""
        return Key(self.prompt.id, self.index)


@dataclass
class Failures:
    """The failures while a model was asked."""

    retried: Counter[str] = field(default_factory=Counter)  # how many requests were made again, by reason
    lost: dict[Any, str] = field(default_factory=dict)  # why a task got no answer, by its key
    stopped: str = ""  # why the model is no longer asked; empty while it is


class Respondent(Protocol):
    """A model that answers."""

    name: str

    @property
    def failures(self) -> Failures:
        """The failures so far."""

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
        """Yield the answers to the ``wanted`` of the ``tasks``, as they come.

        ``tasks`` are all tasks of the run, including those done: batches are cut from all of them in a first and in a
        resumed run, so that an answer never depends on where the run was stopped.
        """
