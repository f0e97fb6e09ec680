"""The path of a training run: how far its checkpoints went, which way, and how much of it one line explains.

All of it follows from the inner products of the checkpoints' deltas, which a comparison has: no weight is read again.
With δᵢ = xᵢ − base at the step tᵢ, and the updates uᵢ = xᵢ − xᵢ₋₁ (the base before the first checkpoint), the products
of the updates are D G Dᵀ, D having 1 on its diagonal and −1 below. What one line explains is RELEX's λ/tr(G) (see
``methods.relex``), and so is the share below which a run has wandered further than it went in any direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from mergekit_lite.comparison.comparison import Comparison, ModelValues, PairValues, cosines, or_none, rows_or_none
from mergekit_lite.comparison.deltas import TensorComparison
from mergekit_lite.comparison.survey import FloatArray
from mergekit_lite.methods.relex import least_share, principal


@dataclass(frozen=True)
class RunPath:
    """The path of some tensors through the checkpoints of a run. None stands for a figure without meaning.

    Attributes:
        steps: at which the checkpoints were written, rising.
        norm: ‖δ‖, the distance from the base.
        moved: ‖u‖, what was added since the checkpoint before.
        turn: cosine of each update with the one before; the first has none.
        toward: cosine of each δ with the last one.
        updates: cosine of each two updates.
        explained: share of the variance of the checkpoints up to each that one line explains; of one there is none.
        bound: the share from which the line is a licence to follow it, likewise.
    """

    steps: tuple[float, ...]
    norm: ModelValues
    moved: ModelValues
    turn: ModelValues
    toward: ModelValues
    updates: PairValues
    explained: ModelValues
    bound: ModelValues

    @property
    def is_line(self) -> bool | None:
        """Whether the line of all checkpoints may be followed; None where nothing moved."""
        explained, bound = self.explained[-1], self.bound[-1]
        return None if explained is None or bound is None else explained >= bound


def path_of(comparison: Comparison, tensors: Sequence[TensorComparison] = ()) -> RunPath:
    """Return the path of a run, of all its tensors or of some; of those that are finite, if any is."""
    tensors = tensors or comparison.tensors
    counted = [one for one in tensors if one.sums.finite] or tensors
    return path_along(comparison.steps, reduce(add, (one.sums for one in counted))["products"])


def path_along(steps: tuple[float, ...], products: FloatArray) -> RunPath:
    """Return the path of checkpoints whose deltas have these inner products (n, n)."""
    back = np.eye(len(steps)) - np.eye(len(steps), k=-1)
    updates = back @ products @ back.T
    alike = cosines(updates)
    numbers = range(2, len(steps) + 1)
    return RunPath(
        steps,
        norm=or_none(np.sqrt(np.diag(products))),
        moved=or_none(np.sqrt(np.diag(updates).clip(0))),
        turn=(None, *or_none(np.diag(alike, -1))),
        toward=or_none(cosines(products)[-1]),
        updates=rows_or_none(alike),
        explained=(None, *(explained(products[:number, :number]) for number in numbers)),
        bound=(None, *(least_share(steps[:number]) for number in numbers)),
    )


def explained(products: FloatArray) -> float | None:
    """Return the share of the checkpoints' variance that one line explains; None where nothing moved."""
    along, total = principal(products)[1]
    return or_none(np.array([along / total if total else np.nan]))[0]


def by_module(comparison: Comparison) -> dict[str, RunPath]:
    """Return the path of each kind of tensor over all layers, by name: ``self_attn.q_proj``."""
    members: dict[str, list[TensorComparison]] = {}
    for compared in comparison.tensors:
        members.setdefault(compared.tensor.module, []).append(compared)
    return {name: path_of(comparison, tensors) for name, tensors in members.items()}


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Return the path of the whole run, and of each kind of tensor, as plain data."""
    modules = {name: asdict(path) for name, path in by_module(comparison).items()}
    return {**asdict(path_of(comparison)), "modules": modules}
