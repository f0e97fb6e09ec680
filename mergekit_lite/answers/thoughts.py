"""The thoughts of an answer: what a reasoning model writes between two marks before its text.

Servers send thoughts apart from the text, or inside it; where the chat template has opened them already, without the
mark that opens. All three are one thing here. Rows for training and other tools have them inside:

    <think>
    thoughts
    </think>

    text
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Thoughts = Literal["keep", "strip", "only"]  # what becomes of a source's thoughts; only: answers with thoughts

MARKS = {  # that open and close thoughts
    "<think>": "</think>",  # Qwen3, DeepSeek-R1, GLM, SmolLM3 and most others
    "[THINK]": "[/THINK]",  # Magistral
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "◁think▷": "◁/think▷",  # Kimi
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
}
OPENING, CLOSING = next(iter(MARKS.items()))


class Parts(NamedTuple):
    """An answer taken apart; its parts have the line breaks that stood between them and the marks."""

    thoughts: str  # blank where there are none
    text: str
    open: bool = False  # the thoughts never closed: the answer was cut

    @property
    def has_thoughts(self) -> bool:
        """Whether there are thoughts that aren't blank."""
        return bool(self.thoughts.strip())

    @property
    def answer(self) -> str:
        """What the user is to read: the text without the line breaks that end the thoughts."""
        return self.text.lstrip() if self.has_thoughts or self.open else self.text

    @property
    def whole(self) -> str:
        """The answer with its thoughts, if it has any, between ``<think>`` and ``</think>``."""
        if not self.has_thoughts:
            return self.answer
        return OPENING + self.thoughts + ("" if self.open else CLOSING + self.text)


def parted(answer: str) -> Parts:
    """Take an answer apart.

    Thoughts are what comes before the first closing mark, if the answer begins with the mark that opens, or that mark
    isn't in front of it at all: then the chat template has opened them.
    """
    body = answer.lstrip()
    for opening, closing in MARKS.items():
        opened = body.startswith(opening)
        thoughts, mark, text = body.removeprefix(opening).partition(closing)
        if opened and not mark:
            return Parts(thoughts, "", open=True)
        if opened or (mark and opening not in thoughts):
            blank = not thoughts.strip()
            thoughts = thoughts if opened or thoughts.startswith("\n") else f"\n{thoughts}"
            return Parts("", text.lstrip()) if blank else Parts(thoughts, text)
    return Parts("", answer)


def parts_of(row: Mapping[str, Any]) -> Parts:
    """Take the answer of a row of ``samples/`` apart; its thoughts may be a field of their own."""
    parts, apart = parted(row["text"]), row.get("thoughts")
    if not isinstance(apart, str) or not apart.strip():
        return parts
    return together(apart, parts.answer)


def together(thoughts: str, text: str) -> Parts:
    """Put thoughts and text that came apart together. Without a text the thoughts were cut."""
    if not text.strip():
        return Parts(f"\n{thoughts.strip()}", "", open=True)
    return Parts(f"\n{thoughts.strip()}\n", f"\n\n{text.lstrip()}")


def as_trained(row: Mapping[str, Any], thoughts: Thoughts) -> str:
    """Return the answer of a row of ``samples/`` as training reads it, with its thoughts or without."""
    parts = parts_of(row)
    return parts.answer if thoughts == "strip" else parts.whole


def is_cut(row: Mapping[str, Any]) -> bool:
    """Return whether an answer was cut: by the limit of tokens, or inside its thoughts."""
    return row.get("finish") == "length" or parts_of(row).open
