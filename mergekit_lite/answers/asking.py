"""What answers prompts: the contract that a server and a model in this process share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lite.answers.rows import Answer, Key, Prompt


class Sampling(BaseModel):
    """How answers are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: Annotated[float, Field(ge=0)] = 0.8  # 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 2048


@dataclass(frozen=True)
class Task:
    """One answer to ask for.

    Attributes:
        prompt: what is asked.
        index: which of the answers to it, from 0.
        seed: of what is drawn.
    """

    prompt: Prompt
    index: int
    seed: int

    @property
    def key(self) -> Key:
        """Its answer's key."""
        return Key(self.prompt.id, self.index)


@dataclass
class Troubles:
    """What went wrong while a model was asked.

    Attributes:
        retried: how often a request was made again, by what had happened to it.
        lost: why a task got no answer, by its key.
        stopped: why the model was asked no more, where it was not.
    """

    retried: Counter[str] = field(default_factory=Counter)
    lost: dict[Key, str] = field(default_factory=dict)
    stopped: str = ""


class Respondent(Protocol):
    """A model that answers."""

    name: str

    @property
    def troubles(self) -> Troubles:
        """What went wrong so far."""

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
        """The answers to the ``wanted`` of the ``tasks``, as they come.

        ``tasks`` are all tasks of the run, done ones included: what answers in batches cuts them alike in a first
        and in a resumed run, so that an answer never depends on where the run was stopped.
        """
