"""What one read of the weights finds in a tensor: NaN, infinity, dead rows, mean, root mean square, largest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mergekit_lite.comparison.shared_tensors import Match
from mergekit_lite.comparison.survey import LARGEST, WIDEST_ROW, Reduction
from mergekit_lite.deferred import torch
from mergekit_lite.errors import counted


@dataclass(frozen=True)
class Weights:
    """One tensor.

    Attributes:
        name, elements: of the tensor.
        nan, infinite: how many elements are so; the other figures are of the rest.
        dead_rows: rows of a matrix that are all zero; None where that is not counted (vectors, very long rows).
        mean, rms, largest: of the finite elements; the largest magnitude.
    """

    name: str
    elements: int
    nan: int
    infinite: int
    dead_rows: int | None
    mean: float
    rms: float
    largest: float

    @property
    def doubt(self) -> str:
        """What looks wrong; empty where nothing does."""
        found = []
        if self.nan:
            found.append(f"{counted(self.nan, 'weight')} NaN")
        if self.infinite:
            found.append(f"{counted(self.infinite, 'weight')} infinite")
        if self.largest == 0 and not found:
            found.append("all weights are zero")
        elif self.dead_rows:
            found.append(f"{counted(self.dead_rows, 'row')} all zero")
        return ", ".join(found)


class Health:
    """The study of one model's weights."""

    sampled = False

    def look(self, match: Match, block: torch.Tensor) -> Reduction:
        """Sums over one block (1, elements). Squares are taken in float64: they would overflow."""
        values = block[0]
        nan = infinite = 0
        if not math.isfinite(values.sum().item()):
            nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
            values = values.nan_to_num(0.0, 0.0, 0.0)
        wide, sizes = values.double(), values.abs()
        matrix = has_rows(match)
        by_row = sizes.view(-1, match.row).amax(1) if matrix else sizes.amax().reshape(1)
        found = {
            "nan": nan,
            "infinite": infinite,
            "dead": torch.eq(by_row, 0, out=torch.empty_like(by_row)).sum().item() if matrix else 0,
            "sum": wide.sum().item(),
            "square": torch.dot(wide, wide).item(),
            LARGEST: by_row.amax().item(),
        }
        return {name: np.array(value, dtype=np.float64) for name, value in found.items()}

    def conclude(self, match: Match, sums: Reduction, sample: torch.Tensor) -> Weights:
        """The finding of one tensor."""
        nan, infinite = int(sums["nan"]), int(sums["infinite"])
        finite = match.numel - nan - infinite
        return Weights(
            match.name,
            match.numel,
            nan,
            infinite,
            int(sums["dead"]) if has_rows(match) else None,
            sums["sum"].item() / finite if finite else math.nan,
            math.sqrt(sums["square"].item() / finite) if finite else math.nan,
            sums[LARGEST].item(),
        )


def has_rows(match: Match) -> bool:
    """Whether rows are looked at: those of a matrix, and not too long to be kept together."""
    return len(match.shape) > 1 and match.row <= WIDEST_ROW
