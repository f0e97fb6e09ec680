"""Answers that begin with another source's.

A source may go on from the beginnings of another one's answers: InCo-DPO (Wang et al. 2025, arXiv 2503.15880). How long
they are is the recipe's to say: the authors' schedule is not known here. They end with a word, as a text that ends
inside of one, or with a space, is no beginning that a model's tokens have. An aggregate may have another source's
answers as its drafts, to criticise and refine them, as in SRT.

An answer has its beginning in front, or a digest of its draft beside it. So a stored one that was made of another text
than the other source's present answer is known, and asked for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.aggregating.messages import Draft
from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.replies import Reply
from mergekit_lite.answers.rows import ANSWER, Key, Message, given_text, read_rows
from mergekit_lite.answers.thoughts import parts_of
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.schema import Continues, Recipe
from mergekit_lite.distillation.tasks import SourceTasks


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


def drafted(
    name: str, tasks: Iterable[Task], others: Iterable[Mapping[str, Any]]
) -> tuple[dict[Key, Draft], dict[Key, str]]:
    """Return the draft that each task begins with, the other source's answer of its number, and why others have none.

    Of fewer answers the first one follows the last one again.

    Args:
        name: of the other source.
        tasks: what an aggregate is to answer.
        others: rows of the other source's answers.
    """
    said: dict[str, list[Mapping[str, Any]]] = {}
    for row in others:
        if parts_of(row).answer.strip():
            said.setdefault(row["prompt"], []).append(row)
    found: dict[Key, Draft] = {}
    lost: dict[Key, str] = {}
    for task in tasks:
        if not (rows := sorted(said.get(task.prompt.id, ()), key=lambda row: int(row["index"]))):
            lost[task.key] = f"no answer of {name} to begin with"
            continue
        row = rows[task.index % len(rows)]
        reply = Reply(row["text"], row.get("finish", "stop"), row.get("tokens"), row.get("thoughts"))
        found[task.key] = Draft(parts_of(row).answer, name, reply)
    return found, lost


def ledger_of_drafted(path: Path, expected: Sequence[Key], drafts: Mapping[Key, Draft]) -> Ledger[Key]:
    """Return the ledger of answers that were made of such drafts; those of others are no rows of it."""
    made_of = {key: digest_of(draft) for key, draft in drafts.items()}

    def key_of(row: dict[str, Any]) -> Key:
        key = Key(row["prompt"], row["index"])
        if key in made_of and row.get("draft") != made_of[key]:
            raise KeyError("it was made of another draft")
        return key

    return Ledger(path, expected, key_of, ANSWER)


def digest_of(draft: Draft) -> str:
    """Return a digest of a draft's text."""
    return xxh3_64_hexdigest(draft.text.encode())


def ledger_of(path: Path, expected: Sequence[Key], beginnings: Mapping[Key, str]) -> Ledger[Key]:
    """Return the ledger of answers with such beginnings; those with others are no rows of it."""

    def key_of(row: dict[str, Any]) -> Key:
        key = Key(row["prompt"], row["index"])
        if not row["text"].startswith(beginnings.get(key, "")):
            raise KeyError("it goes on from another text")
        return key

    return Ledger(path, expected, key_of, ANSWER)


def with_beginnings(recipe: Recipe, asked: SourceTasks, planned: Iterable[SourceTasks]) -> SourceTasks:
    """Return a source's tasks with the beginnings that another source has said by now."""
    continues = asked.source.continues
    assert continues is not None
    tasks, lost = begun(continues, asked.tasks, _answers_of(recipe, continues.source, planned))
    beginnings = {task.key: given_text(task.prompt.messages) for task in tasks}
    ledger = ledger_of(asked.ledger.path, asked.ledger.expected, beginnings)
    return SourceTasks(asked.source, tuple(tasks), ledger, lost)


def with_drafts(recipe: Recipe, asked: SourceTasks, planned: Iterable[SourceTasks]) -> SourceTasks:
    """Return an aggregate's tasks with the drafts that another source has given by now."""
    name = asked.source.drafts
    assert name is not None
    drafts, lost = drafted(name, asked.tasks, _answers_of(recipe, name, planned))
    ledger = ledger_of_drafted(asked.ledger.path, asked.ledger.expected, drafts)
    return SourceTasks(asked.source, tuple(task for task in asked.tasks if task.key in drafts), ledger, lost, drafts)


def _answers_of(recipe: Recipe, name: str, planned: Iterable[SourceTasks]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the answers that a source has given by now."""
    asked = next((each for each in planned if each.source.name == name), None)
    if asked is not None:
        yield from asked.ledger.rows()
    else:
        yield from (line.row for line in read_rows(Folder(recipe.folder).samples(name), [], ANSWER))
