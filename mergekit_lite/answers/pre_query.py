"""Aligned models that say what a user would: Magpie (Xu et al. 2024, arXiv 2406.08464).

The model reads its chat template up to the place of the user's words and goes on there. What it draws ends at a token
of the template, or with the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.answers.asking import Sampling, Task
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.replies import Reply, replies_in, tokens_read
from mergekit_lite.answers.server import Question, Server
from mergekit_lite.answers.template import PreQuery

LINE_END = "\n"


def stopped(sampling: Sampling, before: PreQuery, early: bool) -> Sampling:
    """Return the sampling with the texts that end a user's words; ``early`` has the first line end them."""
    texts = (before.stop, LINE_END if early else "", *(sampling.stop or ()))
    stops = tuple(dict.fromkeys(text for text in texts if text))
    return sampling.model_copy(update={"stop": stops or None})


@dataclass(eq=False)
class LocalUser(Local):
    """A model in this process that says what a user would, whatever the prompt."""

    before: PreQuery = field(kw_only=True)  # what it reads

    def _tokens(self, task: Task) -> tuple[int, ...]:
        return self.before.tokens

    def _whole(self, text: str) -> str:
        return text

    @property
    def _more_ends(self) -> frozenset[int]:
        return self.before.ends


@dataclass(eq=False)
class ServedUser(Server):
    """A server that is asked to go on with the beginning of a chat template (``/completions``)."""

    before: PreQuery = field(kw_only=True)
    odd: bool = field(default=False, init=False)  # it was told that a server reads another text than was sent

    def _asked(self, question: Question, seed: int, number: int) -> dict[str, Any]:
        asked = self.body.of(question.messages, seed, number)
        del asked["messages"]
        # Servers tokenize the text as the tokenizer does by itself, unless told: its first token would be there twice.
        asked["prompt"] = self.before.text.removeprefix(self.before.put[0]) if _puts(asked) else self.before.text
        # Not all servers know it, and those that refuse it end at the tokens of the model's own configuration.
        if "stop_token_ids" not in self.body.refused:
            asked.setdefault("stop_token_ids", sorted(self.before.ends))
        return asked

    def _address(self, url: str) -> str:
        return f"{url.rstrip('/')}/completions"

    def _found(self, url: str, body: bytes, asked: Mapping[str, Any], question: Question) -> list[Reply | None]:
        found = replies_in(body, asked.get("n", 1), blank=True)  # a user who says nothing is counted
        read, wanted, told = tokens_read(body), len(self.before.tokens), _puts(asked) and any(self.before.lacks)
        if read not in (None, wanted) and not told and not self.odd:
            self.odd = True
            self.failures.notes.append(
                f"{url} says that it read {read:,} tokens, where {wanted:,} stand before a user's words: it may have "
                "put a chat template of its own around them, and then what it says is no user's"
            )
        return found


def _puts(asked: Mapping[str, Any]) -> bool:
    """Return whether a server puts the tokenizer's own tokens around the text of a request."""
    return bool(asked.get("add_special_tokens", True))
