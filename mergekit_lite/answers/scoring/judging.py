"""What language models that judge share: their options, how they are asked, and the prompts that users write."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from mergekit_lite.answers.asking import Sampling, urls_of
from mergekit_lite.answers.replies import Reply
from mergekit_lite.answers.requests import RequestBody
from mergekit_lite.answers.rows import Message, Prompt
from mergekit_lite.answers.scoring.scorer import Positive, Score, Scorer, ScorerOptions, ScorerSettings
from mergekit_lite.answers.server import Question, Server, ask
from mergekit_lite.answers.tags import fields_of
from mergekit_lite.errors import RunError, shortened

THOUGHTS = "</think>"


class JudgeOptions(ScorerOptions):
    """The options of every judge."""

    system: str | None = None  # a system prompt
    temperature: Annotated[float, Field(ge=0)] = 0
    max_tokens: Positive = 1024
    chat_template_kwargs: dict[str, Any] | None = None  # for the chat template: {enable_thinking: false}
    extra_body: dict[str, Any] | None = None  # anything else of a request
    timeout: Annotated[float, Field(gt=0)] = 600  # seconds that a request may take
    retries: Annotated[int, Field(ge=0)] = 8  # repetitions of a request that failed

    def turns(self, text: str) -> list[Message]:
        """Return the conversation that asks for a judgement."""
        before = [] if self.system is None else [Message(role="system", content=self.system)]
        return [*before, Message(role="user", content=text)]


class ServedJudge(Scorer):
    """A judge behind a server. Nothing is asked before ``score``."""

    settings: ScorerSettings
    options: JudgeOptions

    def __init__(self, settings: ScorerSettings, options: JudgeOptions):
        self.name, self.settings, self.options = settings.name, settings, options


def with_fields(prompt: str, fields: Collection[str], needed: Mapping[str, str]) -> str:
    """Return a prompt of the user's, once its fields are known ones and the needed ones are there.

    Args:
        prompt: with fields in braces.
        fields: that it may have.
        needed: what the judge would not see without it, by field.

    Raises:
        ValueError: they are not.
    """
    found = fields_of(prompt)
    unknown = [name for name in found if name not in fields]
    if unknown:
        raise ValueError(f"no field {unknown[0]!r}: there are {', '.join(fields)}; other braces are written twice")
    for name, what in needed.items():
        if name not in found:
            raise ValueError(f"the field {{{name}}} is missing: the judge would not see {what}")
    return prompt


def conversation(prompt: Prompt) -> str:
    """Return a prompt's messages as a judge reads them."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)


def replies_of(settings: ScorerSettings, options: JudgeOptions, questions: Sequence[Question]) -> list[Reply | str]:
    """Ask the judge, and return its reply to each question, in order, or why there is none.

    Args:
        settings: of the scorer, with a model and a server.
        options: of the judge.
        questions: with their places as keys.

    Raises:
        RunError: the server refuses, or has stopped answering.
    """
    assert settings.server is not None and settings.model is not None
    names = {"temperature", "max_tokens", "chat_template_kwargs", "extra_body"}
    sampling = Sampling(top_p=1, **options.model_dump(include=names))
    server = Server(
        urls_of(settings.server),
        RequestBody(settings.model, sampling, said=options.model_fields_set),
        key_variable=settings.api_key_variable,
        concurrency=settings.concurrency,
        timeout=options.timeout,
        retries=options.retries,
    )
    replies = {question.key: reply for _, question, reply in ask({server: questions})}
    if server.failures.stopped:
        raise RunError(f"The judge {settings.name} was asked no more. {server.failures.stopped}")
    return [
        replies[place]
        if place in replies
        else f"the judge didn't answer: {server.failures.lost.get(place, 'no reply')}"
        for place in range(len(questions))
    ]


def mean_of(scores: Sequence[Score]) -> Score:
    """Return the mean of the scores there are; without any, the first one, which says why."""
    values = [score.value for score in scores if score.value is not None]
    return Score(fmean(values)) if values else scores[0]


def said_in(reply: Reply) -> str:
    """Return what a judge said after its thoughts."""
    return reply.text.rpartition(THOUGHTS)[2]


def nothing_in(reply: Reply, what: str, options: JudgeOptions) -> str:
    """Say that a reply has no verdict, and how it ends."""
    cut = f" (it was cut at {options.max_tokens} tokens)" if reply.finish == "length" else ""
    return f"no {what} in the judge's reply{cut}: …{shortened(said_in(reply).strip()[-100:])}"
