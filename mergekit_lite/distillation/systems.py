"""Prompts that are asked under several system messages, as Janus' data are (Lee et al. 2024, arXiv 2405.17977)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from mergekit_lite.answers.rows import Message, Prompt, seed_of
from mergekit_lite.distillation.recipe.choosing import ChosenPrompts, Systems


def with_column(entry: ChosenPrompts) -> ChosenPrompts:
    """Return a source of prompts that keeps the column with the system messages."""
    column = entry.systems and entry.systems.column
    if column is None or entry.keep == "all" or column in entry.keep:
        return entry
    return entry.model_copy(update={"keep": (*entry.keep, column)})


def asked_under(
    entry: ChosenPrompts, prompts: Iterable[Prompt], seed: int, problems: list[str], places: dict[str, str]
) -> Iterator[tuple[Prompt, str]]:
    """Yield each prompt with its place, as many times as it has system messages.

    Args:
        entry: the source of prompts.
        prompts: of this source.
        seed: draws the system messages, where all prompts share them.
        problems: gets a message, with the place, for each prompt that can't be asked so.
        places: of the prompts, by their ids.
    """
    for prompt in prompts:
        place = places[prompt.id]
        if entry.systems is None:
            yield prompt, place
            continue
        try:
            texts = _texts(entry.systems, prompt, seed)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        kept = entry.keep == "all" or entry.systems.column in entry.keep
        columns = {name: value for name, value in prompt.columns.items() if kept or name != entry.systems.column}
        for number, text in enumerate(texts, 1):
            messages = (Message(role="system", content=text), *prompt.messages)
            yield (
                replace(
                    prompt,
                    id=f"{prompt.id}:{number}",
                    messages=messages,
                    columns=columns,
                    question=prompt.id,
                    plain=False,
                ),
                place,
            )


def _texts(systems: Systems, prompt: Prompt, seed: int) -> list[str]:
    """Return the system messages of a prompt. Raises ValueError where it can't have any."""
    if prompt.messages[0]["role"] == "system":
        raise ValueError("it has a system message already, and `systems` would be a second one")
    if systems.column is None:
        order = sorted(systems.texts, key=lambda text: seed_of(seed, "systems", prompt.id, text))
        return order[: systems.each]
    given: Any = prompt.columns.get(systems.column)
    if not isinstance(given, list) or not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError(f"the column {systems.column!r} has no list of texts")
    texts = list(dict.fromkeys(given))[: systems.each]
    if len(texts) < 2:
        raise ValueError(f"the column {systems.column!r} has fewer than two different system messages")
    return texts
