"""The other answers to a prompt, for scorers that compare: read again where they lie, a prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mergekit_lite.answers.rows import ANSWER, Key, read_rows
from mergekit_lite.answers.thoughts import parts_of

KEPT = 64  # prompts whose answers are in memory: sources that answered in another order are read more than once


class _Place(NamedTuple):
    path: Path
    start: int  # of the row, in bytes


class Pool:
    """The answers of some sources, by prompt. Memory has their places only."""

    def __init__(self, paths: Iterable[Path]):
        """Note where the answers are; rows that are none are left out, as others tell of them."""
        self._places: dict[str, dict[_Place, int]] = {}  # by prompt; each with its number among the source's
        for path in paths:
            for line in read_rows(path, [], ANSWER):
                self._places.setdefault(line.row["prompt"], {})[_Place(path, line.start)] = line.row["index"]
        self._answers = lru_cache(KEPT)(self._read)

    def rivals(self, path: Path, key: Key) -> tuple[str, ...]:
        """Return all answers to the prompt but one, without their thoughts, in the order of the sources and numbers."""
        return tuple(
            text for origin, number, text in self._answers(key.prompt) if (origin, number) != (path, key.number)
        )

    def _read(self, prompt: str) -> Sequence[tuple[Path, int, str]]:
        found = []
        for place, number in self._places.get(prompt, {}).items():
            with place.path.open("rb") as file:
                file.seek(place.start)
                found.append((place.path, number, parts_of(json.loads(file.readline())).answer))
        order = list(dict.fromkeys(path for path, _, _ in found))
        return sorted(found, key=lambda each: (order.index(each[0]), each[1]))
