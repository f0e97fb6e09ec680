"""Scorers whose best is known, and what drives a search over them."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_lite.boost.search import Numbers, Outcome, Search


def tried(search: Search, score: Callable[[Numbers], float | Outcome | None]) -> list[Numbers]:
    """The candidates a search asks for, where each is told its score; None is out of limits."""
    asked: list[Numbers] = []
    try:
        numbers = next(search)
        while True:
            asked.append(dict(numbers))
            value = score(numbers)
            if value is None:
                value = Outcome(0.0, allowed=False)
            numbers = search.send(value if isinstance(value, Outcome) else Outcome(value))
    except StopIteration:
        return asked


def alphas(search: Search, score: Callable[[float], float | None]) -> list[float]:
    """The same for searches over alpha."""
    return [numbers["alpha"] for numbers in tried(search, lambda numbers: score(numbers["alpha"]))]


def best(asked: list[float], score: Callable[[float], float | None]) -> float:
    """What an exact scorer chooses: the best of the asked and 0."""
    known = {0.0: 0.0} | {alpha: value for alpha in asked if (value := score(alpha)) is not None}
    return max(sorted(known), key=lambda alpha: known[alpha])
