"""Answers to judge."""

from __future__ import annotations

from typing import Any

from mergekit_lite.answers.rows import Message, Prompt
from mergekit_lite.answers.scoring.scorer import Judged


def judged(answer: str, question: str = "What is one and one?", **prompt: Any) -> Judged:
    """An answer to a question."""
    return Judged(Prompt("p", (Message(role="user", content=question),), **prompt), answer)
