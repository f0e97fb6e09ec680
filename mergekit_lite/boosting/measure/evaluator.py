"""The bench of a search: several ways to measure, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from mergekit_lite.boosting.candidates.candidate import Numbers, Row
from mergekit_lite.boosting.measure.resident_model import Stand
from mergekit_lite.errors import NonFiniteError


class Measure(Protocol):
    """One way to measure candidates."""

    @property
    def items(self) -> list[str]:
        """What it measures them on."""

    @property
    def asked(self) -> Mapping[str, str]:
        """What items ask, where they ask something."""

    @property
    def names(self) -> Sequence[str]:
        """The scores its rows have."""

    def rows(self, numbers: Numbers, items: Sequence[str], wanted: frozenset[str]) -> Iterator[Row]:
        """The rows of the wanted ones of its items, as ``Bench.measure`` gives them."""


class Bench:
    """Measures candidates in one way after the other. Items of different ways have different names.

    Attributes:
        measures: the ways.
        stand: the model that they measure; where none is in this process, what tells of written candidates.
        items: of all measures.
    """

    def __init__(self, measures: Sequence[Measure], stand: Stand) -> None:
        """Nothing is measured yet."""
        self.measures = measures
        self.stand = stand
        self.items: Sequence[str] = [item for measure in measures for item in measure.items]

    @property
    def asked(self) -> dict[str, str]:
        """What the items ask, where they ask something."""
        return {item: text for measure in self.measures for item, text in measure.asked.items()}

    def measure(self, numbers: Numbers, items: Sequence[str], wanted: frozenset[str]) -> Iterator[Row]:
        """The rows of the wanted items. A candidate with weights that aren't finite has no verdict on any.

        Raises:
            NonFiniteError: the baseline's weights aren't finite.
        """
        for measure in self.measures:
            own = frozenset(measure.items)
            missing = own & wanted
            try:
                for row in measure.rows(numbers, [item for item in items if item in own], missing) if missing else ():
                    missing -= {row["item"]}
                    yield row
            except NonFiniteError:
                if numbers == self.stand.family.baseline:
                    raise
                yield from (Row(item=item, values=dict.fromkeys(measure.names)) for item in sorted(missing))

    def facts(self, numbers: Numbers) -> dict[str, Any]:
        """Effective alpha, and what setting the weights took."""
        return dict(self.stand.facts(numbers))
