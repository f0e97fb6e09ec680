"""Answers that go on from the beginnings of another source's: InCo-DPO (Wang et al. 2025, arXiv 2503.15880).

How long the beginnings are is the recipe's to say: the authors' schedule is not known here. They end with a word, as a
text that ends inside of one, or with a space, is no beginning that a model's tokens have.

An answer has its beginning in front. So a stored one that begins otherwise was made of another source's answer that is
no longer there, and is asked for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import ANSWER, Key, Message
from mergekit_lite.answers.thoughts import parts_of
from mergekit_lite.distillation.recipe.schema import Continues


def beginning(text: str, share: float) -> str:
    """Return whole words from the start of a text, no more than a share of its characters.

    Of a text without spaces, such as Chinese, it is that many characters.
    """
    end = int(share * len(text) + 1e-9)
    start = text[:end]
    if end < len(text) and not text[end].isspace() and any(map(str.isspace, text)):
        words = start.split()
        inside = bool(start) and not start[-1].isspace()
        start = start[: start.rfind(words[-1])] if words and inside else start
    return start.rstrip()


def begun(
    continues: Continues, tasks: Iterable[Task], others: Iterable[Mapping[str, Any]]
) -> tuple[list[Task], dict[Key, str]]:
    """Return tasks whose prompts end with the beginning of an answer, and why others can't be begun, by their keys.

    The answers to a prompt take the shares in turn; each time all shares were had, that of the other source's next
    answer, and of the first one again after the last. Where a beginning has no word the answer is the model's alone.

    Args:
        continues: whose answers, and how much of them.
        tasks: with prompts as they are.
        others: rows of the other source's answers.
    """
    texts: dict[str, dict[int, str]] = {}
    for row in others:
        texts.setdefault(row["prompt"], {})[row["index"]] = parts_of(row).answer
    found: list[Task] = []
    lost: dict[Key, str] = {}
    for task in tasks:
        said = sorted(texts.get(task.prompt.id, {}).items())
        if not said:
            lost[task.key] = f"no answer of {continues.source} to go on from"
            continue
        turn, place = divmod(task.index, len(continues.share))
        given = beginning(said[turn % len(said)][1], continues.share[place])
        messages = task.prompt.messages
        if given:
            messages = (*messages, Message(role="assistant", content=given))
        found.append(replace(task, prompt=replace(task.prompt, messages=messages)))
    return found, lost


def ledger_of(path: Path, expected: Sequence[Key], beginnings: Mapping[Key, str]) -> Ledger[Key]:
    """Return the ledger of answers with such beginnings; those with others are no rows of it."""

    def key_of(row: dict[str, Any]) -> Key:
        key = Key(row["prompt"], row["index"])
        if not row["text"].startswith(beginnings.get(key, "")):
            raise KeyError("it goes on from another text")
        return key

    return Ledger(path, expected, key_of, ANSWER)
