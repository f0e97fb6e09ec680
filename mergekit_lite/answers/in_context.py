"""Base models that are shown how to answer: a text of rules and examples, then the conversation in the same form.

URIAL (Lin et al. 2023, arXiv 2312.01552), as tml-epfl/icl-alignment runs it: the text ends with examples, and each turn
follows under its heading, between fences:

    # Query:
    ```
    What is one and one?
    ```

    # Answer:
    ```

The model goes on, and ends at the next heading. Theirs removes every fence from an answer; here only the one that
closes it is, so that fenced code in an answer stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.answers.asking import Sampling, Task
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.offline import Offline
from mergekit_lite.answers.replies import Failed, Reply
from mergekit_lite.answers.rows import Message, with_system
from mergekit_lite.answers.server import Server

HEADINGS = {"user": "# Query:", "assistant": "# Answer:"}
FENCE = "```"
STOPS = ("# Query", "# User")  # end an answer, unless the sampling says others


def text_of(examples: str, messages: Sequence[Message]) -> str:
    """Return what the model reads: rules and examples, the conversation, and the heading of the answer.

    A system message is put before the first turn of the user, a blank line between: the form has no place for it.
    """
    first, *rest = messages
    if first["role"] == "system" and rest and rest[0]["role"] == "user":
        messages = [Message(role="user", content=f"{first['content']}\n\n{rest[0]['content']}"), *rest[1:]]
    turns = (
        f"\n{HEADINGS.get(each['role'], HEADINGS['user'])}\n{FENCE}\n{each['content']}\n{FENCE}\n" for each in messages
    )
    return f"{examples}{''.join(turns)}\n{HEADINGS['assistant']}\n{FENCE}\n"


def answer_in(text: str) -> str:
    """Return an answer without the fence that closes it, and what a model wrote behind that.

    A fence without a language opens code in the answer where a line follows at once, and two more fences: the one that
    closes the code, and the answer's own.
    """
    lines = text.split("\n")
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith(FENCE)]
    inside = False
    for place, number in enumerate(fences):
        follows = number + 1 < len(lines) and bool(lines[number + 1].strip())
        opens = follows and len(fences) - place > 2
        if lines[number].strip() == FENCE and not inside and not opens:
            return "\n".join(lines[:number]).strip()
        inside = not inside
    text = text.strip()
    return text.removesuffix(FENCE).rstrip() if inside or text.count(FENCE) % 2 else text


def stopped(sampling: Sampling) -> Sampling:
    """Return the sampling with the texts that end an answer."""
    return sampling if sampling.stop is not None else sampling.model_copy(update={"stop": STOPS})


@dataclass(eq=False)
class CompletionServer(Server):
    """A server that is asked to go on with a text (``/completions``), as base models have no chat template."""

    examples: str = ""  # rules and examples

    def _asked(self, question: Any, seed: int, number: int) -> dict[str, Any]:
        asked = self.body.of(question.messages, seed, number)
        asked["prompt"] = text_of(self.examples, asked.pop("messages"))
        return asked

    def _address(self, url: str) -> str:
        return f"{url.rstrip('/')}/completions"

    def _found(self, url: str, body: bytes, asked: Mapping[str, Any], question: Any) -> list[Reply | None]:
        found = [_without_fence(reply) for reply in super()._found(url, body, asked, question)]
        if found == [None]:
            raise Failed("an empty reply", repeat=True, fresh_seed=True)
        return found


def _without_fence(reply: Reply | None) -> Reply | None:
    """Return a reply as an answer; None for one that was nothing but the fence that ends it."""
    if reply is None:
        return None
    text = answer_in(reply.text)
    return None if reply.text.strip() and not text and reply.finish == "stop" else reply._replace(text=text)


@dataclass(eq=False)
class InContext(Local):
    """A model in this process that reads rules and examples first."""

    examples: str = field(kw_only=True)

    def _tokens(self, task: Task) -> tuple[int, ...]:
        text = text_of(self.examples, with_system(task.prompt.messages, self.system))
        return tuple(self.tokenizer(text)["input_ids"])

    def _whole(self, text: str) -> str:
        return answer_in(text)

    @property
    def notes(self) -> list[str]:
        """Nothing: it needs no chat template."""
        return []


@dataclass(eq=False)
class OfflineInContext(InContext, Offline):
    """The same, by vLLM."""
