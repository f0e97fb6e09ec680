"""The figures of a measured candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite.boosting.candidates.candidate import NONE, ItemRow, Params, Rivals
from mergekit_lite.boosting.search.point import Point, Settings, point
from mergekit_lite.boosting.search.study import Study
from tests.boost.synthetic import measure


class Thinking:
    """Answers that are better at alpha 1, where ``thinks`` says how much is thought before each."""

    def __init__(self, thinks: int) -> None:
        self.items: Sequence[str] = [f"q{number}" for number in range(60)]
        self.thinks = thinks

    def measure(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        for item in sorted(wanted):
            number, alpha = int(item[1:]), params["alpha"]
            thoughts = f"<think>\n{'so ' * number * int(alpha) * self.thinks}\n</think>\n\n" if self.thinks else ""
            text = "It is." + " Sure." * (number % 5) + " Yes." * (number % 3) * int(alpha)
            values: Mapping[str, float | None] = {"s": number % 7 + alpha * (number % 4)}
            yield ItemRow(item=item, values=dict(values), text=thoughts + text, finish="stop")

    def portions(self, items: Sequence[str]) -> list[list[str]]:
        return [list(items)]

    def facts(self, params: Params) -> dict[str, Any]:
        return {}


def measured(folder: Path, thinks: int) -> Point:
    evaluator, settings = Thinking(thinks), Settings(score="s")
    with Study(folder, {}, evaluator.items) as study:
        items = [item for cluster in study.clusters for item in cluster]
        measure(evaluator, study, settings.baseline, {"alpha": 1.0})
        return point({"alpha": 1.0}, items, study, settings)


def test_thoughts_are_no_length_of_an_answer(tmp_path: Path) -> None:
    """A scorer doesn't get them, and servers send them apart: a gain can't be explained by them."""
    brief, thoughtful = (measured(tmp_path / str(thinks), thinks) for thinks in (0, 4))
    assert thoughtful.length == brief.length and thoughtful.win_rates == brief.win_rates
    assert brief.length is not None and brief.length.longer > 0
