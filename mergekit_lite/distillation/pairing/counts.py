"""Counts of answers to look at before training: how many were cut or have thoughts, and how long they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lite.answers.thoughts import is_cut, parted, parts_of

CUT = "cut by the limit of tokens, so not chosen"
VETOED = "vetoed, so not chosen"


@dataclass
class AnswerCounts:
    """Numbers of answers."""

    answers: int = 0
    cut: int = 0  # by the limit of tokens
    thoughts: int = 0  # with thoughts
    characters: int = 0  # of all together; with thoughts where these were kept

    def add(self, row: Mapping[str, Any]) -> None:
        """Count an answer of ``samples/``."""
        parts = parts_of(row)
        self.answers += 1
        self.cut += is_cut(row)
        self.thoughts += parts.has_thoughts
        self.characters += len(parts.whole)

    def add_trained(self, text: str, cut: bool) -> None:
        """Count an answer of ``pairs/``."""
        self.answers += 1
        self.cut += cut
        self.thoughts += parted(text).has_thoughts
        self.characters += len(text)

    @property
    def mean_length(self) -> float:
        """The mean of the answers' lengths, in characters."""
        return self.characters / self.answers if self.answers else 0.0

    @property
    def cells(self) -> list[str]:
        """The row of a table under ``HEADS``."""
        return [f"{self.answers:,}", f"{self.cut:,}", f"{self.thoughts:,}", f"{self.mean_length:,.0f}"]


HEADS = (">answers", ">cut", ">with thoughts", ">mean characters")


def counts_of(rows: Iterable[Mapping[str, Any]]) -> AnswerCounts:
    """Count the rows of ``samples/``."""
    counts = AnswerCounts()
    for row in rows:
        counts.add(row)
    return counts


def counts_by_role(rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, AnswerCounts]:
    """Count the answers in the rows of ``pairs/``, which are by the names of their files, by what they are for."""
    counts: dict[str, AnswerCounts] = {}
    for row in rows.get("sft", ()):
        counts.setdefault("SFT", AnswerCounts()).add_trained(row["response"], row.get("cut", False))
    for row in rows.get("preference", ()):
        for side in ("chosen", "rejected"):
            for answer in row[side]:
                role = f"{side}, {answer['role']}"
                counts.setdefault(role, AnswerCounts()).add_trained(answer["text"], answer.get("cut", False))
    return dict(sorted(counts.items()))
