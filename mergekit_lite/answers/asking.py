"""The contract of a respondent, which answers prompts: a server, or a model in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lite.answers.rows import Answer, Key, Prompt
from mergekit_lite.errors import counted

SHOWN = 3  # reasons of missing answers in a message


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


class PolicySampling(Sampling):
    """How answers are drawn from the model's own distribution, unless told."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


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


class Notes:
    """Tells what is found out about servers while they are asked, each thing once."""

    def __init__(self, respondents: Mapping[str, Respondent], warn: Callable[[str], None]):
        self._respondents, self._warn = respondents, warn
        self._told: Counter[str] = Counter()  # notes, by name

    def tell(self) -> None:
        """Tell what is new."""
        for name, who in self._respondents.items():
            for note in who.failures.notes[self._told[name] :]:
                self._warn(f"{name}: {note}")
                self._told[name] += 1


def repeated(failures: Failures) -> str | None:
    """Return how many requests were made again, and why; None for none."""
    if not failures.retried:
        return None
    why = ", ".join(f"{reason} {count:,}×" for reason, count in failures.retried.most_common())
    return f"{counted(failures.retried.total(), 'request')} made again: {why}"


def reasons(lost: Mapping[Key, str]) -> str:
    """Return why answers are missing, the most frequent reasons first."""
    example = {why: key.prompt for key, why in lost.items()}
    counts = Counter(lost.values()).most_common()
    shown = [f"{why} ({count:,}×, for instance the prompt {example[why]})" for why, count in counts[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(counts) - SHOWN:,} other reasons" if len(counts) > SHOWN else "")
