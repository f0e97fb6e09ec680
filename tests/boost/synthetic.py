"""Scorers whose best is known, and what drives a search over them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mergekit_lite.boosting.candidates.candidate import NONE, Evaluator, ItemRow, Job, Params, Rivals, label, pieces
from mergekit_lite.boosting.search.search import Search, SearchOutcome
from mergekit_lite.boosting.search.study import Study


def tried(search: Search, score: Callable[[Params], float | SearchOutcome | None]) -> list[Params]:
    """The candidates a search asks for, where each is told its score; None is out of limits."""
    asked: list[Params] = []
    try:
        batch = next(search)
        while True:
            asked += [dict(params) for params in batch]
            values = [score(params) for params in batch]
            outcomes = [SearchOutcome(0.0, allowed=False) if value is None else value for value in values]
            batch = search.send([each if isinstance(each, SearchOutcome) else SearchOutcome(each) for each in outcomes])
    except StopIteration:
        return asked


def alphas(search: Search, score: Callable[[float], float | None]) -> list[float]:
    """The same for searches over alpha."""
    return [params["alpha"] for params in tried(search, lambda params: score(params["alpha"]))]


def best(asked: list[float], score: Callable[[float], float | None]) -> float:
    """What an exact scorer chooses: the best of the asked and 0."""
    known = {0.0: 0.0} | {alpha: value for alpha in asked if (value := score(alpha)) is not None}
    return max(sorted(known), key=lambda alpha: known[alpha])


def measure(evaluator: Evaluator, study: Study, *candidates: Params) -> None:
    """Measure candidates on all items."""
    for params in candidates:
        for piece in pieces(evaluator, study.items, Job(params, frozenset(study.items))):
            study.record(params, piece)


class SyntheticEvaluator:
    """Items of different difficulty, answered by candidates of which the curve tells how good they are.

    The noise is common in part, as with common prompts, and the rest is drawn for each candidate and item.
    """

    def __init__(
        self,
        curve: Callable[[Params], float],
        items: int = 400,
        noise: float = 0.5,
        words: Callable[[Params, random.Random], int] = lambda params, rng: rng.randint(5, 30),
    ):
        self.items = [f"item {number}" for number in range(items)]
        self.curve, self.noise, self.words = curve, noise, words
        self.measured: list[tuple[str, str]] = []
        self.fail_after: int | None = None
        self.portion = 16

    def measure(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        for item in items:
            if item in wanted:
                if self.fail_after is not None and len(self.measured) >= self.fail_after:
                    raise KeyboardInterrupt
                self.measured.append((label(params), item))
                yield self.row(params, item)

    def row(self, params: Params, item: str) -> ItemRow:
        common, own = random.Random(item), random.Random(f"{item} {label(params)}")
        value = common.gauss(0, 2) + self.curve(params) + own.gauss(0, self.noise)
        text = " ".join(own.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(self.words(params, own)))
        return ItemRow(item=item, values={"score": value, "other": -value}, text=text, finish="stop", tokens=len(text))

    def portions(self, items: Sequence[str]) -> list[list[str]]:
        return [list(items[start : start + self.portion]) for start in range(0, len(items), self.portion)]

    def facts(self, params: Params) -> dict[str, Any]:
        return {"effective_alpha": 0.9 * next(iter(params.values()))}
