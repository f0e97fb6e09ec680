"""The contract of a respondent, which answers prompts: a server, or a model in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lite.answers.rows import Answer, Key, Prompt


class Sampling(BaseModel):
    """The settings by which answers are drawn. What is None is not sent to a server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: Annotated[float, Field(ge=0)] = 0.8  # 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    top_k: Annotated[int, Field(ge=1)] | None = None  # from the so many most probable tokens
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None  # from tokens this share as probable as the most probable
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None  # servers only, as the next
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = (
        None  # ends an answer
    )
    max_tokens: Annotated[int, Field(ge=1)] = 2048
    chat_template_kwargs: dict[str, Any] | None = None  # for the chat template: {enable_thinking: false}
    extra_body: dict[str, Any] | None = None  # anything else of a server's request


def urls_of(server: str | Sequence[str]) -> tuple[str, ...]:
    """Return the URLs of a server, which a recipe gives as one text or several."""
    return (server,) if isinstance(server, str) else tuple(server)


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
    notes: list[str] = field(default_factory=list)  # what was found out about a server, each told once


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
