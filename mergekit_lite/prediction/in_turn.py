"""Several plans that are carried out one after the other: what all of them take, and each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.planning import Plan
from mergekit_lite.prediction.cluster import Cluster
from mergekit_lite.prediction.costs import Costs, measured_costs
from mergekit_lite.prediction.prediction import FITS, Prediction, predict


@dataclass(frozen=True)
class InTurn:
    """What some plans take that are carried out in their order.

    Attributes:
        predictions: of each; start-up is in the first one.
    """

    predictions: tuple[Prediction, ...]

    @property
    def seconds(self) -> float:
        """From start to end."""
        return sum(each.seconds for each in self.predictions)

    def to_json(self) -> dict[str, Any]:
        """Return the sums as plain data, and the most memory that one of the plans takes."""
        moved: Counter[str] = Counter()
        for each in self.predictions:
            moved.update(each.to_json()["bytes"])
        return {
            "seconds": {"total": round(self.seconds, 3)},
            "processor_seconds": round(sum(each.processor for each in self.predictions), 3),
            "bytes": dict(moved),
            "memory": max((each.memory for each in self.predictions), default=0),
        }


def predict_in_turn(
    plans: Sequence[Plan],
    cluster: Cluster,
    workers: int | None = None,
    started: float | None = None,
    costs_of: Callable[[Plan], Costs] = measured_costs,
) -> InTurn:
    """Predict plans that are carried out in their order: later ones may read what earlier ones read, or write.

    Args:
        plans: where one is made of another's output, that need not be there yet.
        cluster: as in ``predict``.
        workers: as in ``predict``.
        started: as in ``predict``, for all of them.
        costs_of: gives what the jobs of a plan cost.
    """
    told: list[Prediction] = []
    before: set[Path] = set()
    stay = sum(plan.bytes_to_read + plan.bytes_to_write for plan in plans) <= FITS * cluster.free_memory
    for plan in plans:
        told.append(predict(plan, cluster, workers, 0.0 if told else started, costs_of(plan), before))
        if stay:
            before |= {file.path for source in plan.inputs for file in source.files_read}
    return InTurn(tuple(told))
