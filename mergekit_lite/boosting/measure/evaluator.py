"""The evaluator of a search: several ways to measure candidates, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from mergekit_lite.boosting.candidates.candidate import NONE, ItemRow, Params, Rivals
from mergekit_lite.boosting.measure.resident_model import ResidentModel
from mergekit_lite.errors import NonFiniteError


class Measure(Protocol):
    """One way to measure candidates."""

    @property
    def items(self) -> list[str]:
        """The items it measures candidates on."""

    @property
    def asked(self) -> Mapping[str, str]:
        """The question of each item that has one."""

    @property
    def names(self) -> Sequence[str]:
        """The names of its scores."""

    @property
    def at_once(self) -> int | None:
        """How many of its items, cut in their order, are measured at once; None for all."""

    def rows(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        """Yield the rows of the wanted items, as ``Evaluator.measure`` does."""


class ModelEvaluator:
    """Measures candidates by one measure after the other; no two measures have an item of the same name."""

    def __init__(self, measures: Sequence[Measure], resident: ResidentModel) -> None:
        self.measures = measures
        self.resident = resident  # the measured model; with a server, the record of the candidates written for it
        self.items: Sequence[str] = [item for measure in measures for item in measure.items]

    @property
    def asked(self) -> dict[str, str]:
        """The question of each item that has one."""
        return {item: text for measure in self.measures for item, text in measure.asked.items()}

    def portions(self, items: Sequence[str]) -> list[list[str]]:
        """Cut the items of each measure into portions, in the order of their first items."""
        places = {item: place for place, item in enumerate(items)}
        cut: list[list[str]] = []
        for measure in self.measures:
            own = sorted(measure.items, key=places.__getitem__)
            size = measure.at_once or max(1, len(own))
            cut += [own[start : start + size] for start in range(0, len(own), size)]
        return sorted(cut, key=lambda portion: places[portion[0]])

    def measure(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        """Yield the rows of the wanted items. A candidate whose weights aren't finite has no score on any.

        Raises:
            NonFiniteError: the baseline's weights aren't finite.
        """
        for measure in self.measures:
            own = frozenset(measure.items)
            missing = own & wanted
            try:
                ordered = [item for item in items if item in own]
                for row in measure.rows(params, ordered, missing, rivals) if missing else ():
                    missing -= {row["item"]}
                    yield row
            except NonFiniteError:
                if params == self.resident.family.baseline:
                    raise
                yield from (ItemRow(item=item, values=dict.fromkeys(measure.names)) for item in sorted(missing))

    def facts(self, params: Params) -> dict[str, Any]:
        """Return the effective alpha, and the time that setting the weights took."""
        return dict(self.resident.facts(params))
