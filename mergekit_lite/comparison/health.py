"""Health of the weights of a tensor: NaN, infinity, dead rows, mean, root mean square, largest magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mergekit_lite.comparison.shared_tensors import SharedTensor
from mergekit_lite.comparison.survey import LARGEST, WIDEST_ROW, Sums
from mergekit_lite.deferred import torch
from mergekit_lite.errors import counted


@dataclass(frozen=True)
class WeightStatistics:
    """Statistics of one tensor.

    Attributes:
        name, elements: of the tensor.
        nan, infinite: number of elements that are NaN or infinite.
        dead_rows: number of rows of a matrix that are all zero; None for vectors and very long rows.
        mean, rms, largest: mean, root mean square and largest magnitude of the finite elements.
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
        """What looks wrong with the tensor; empty where nothing does."""
        faults = []
        if self.nan:
            faults.append(f"{counted(self.nan, 'weight')} NaN")
        if self.infinite:
            faults.append(f"{counted(self.infinite, 'weight')} infinite")
        if self.largest == 0 and not faults:
            faults.append("all weights are zero")
        elif self.dead_rows:
            faults.append(f"{counted(self.dead_rows, 'row')} all zero")
        return ", ".join(faults)


class WeightMeasurement:
    """Measurement of one model's weights."""

    needs_sample = False

    def block_sums(self, tensor: SharedTensor, block: torch.Tensor) -> Sums:
        """Return the sums over one block (1, elements). Squares are taken in float64, as they could overflow."""
        values = block[0]
        nan = infinite = 0
        if not math.isfinite(values.sum().item()):
            nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
            values = values.nan_to_num(0.0, 0.0, 0.0)
        wide, sizes = values.double(), values.abs()
        matrix = has_rows(tensor)
        by_row = sizes.view(-1, tensor.row).amax(1) if matrix else sizes.amax().reshape(1)
        sums = {
            "nan": nan,
            "infinite": infinite,
            "dead": torch.eq(by_row, 0, out=torch.empty_like(by_row)).sum().item() if matrix else 0,
            "sum": wide.sum().item(),
            "square": torch.dot(wide, wide).item(),
            LARGEST: by_row.amax().item(),
        }
        return {name: np.array(value, dtype=np.float64) for name, value in sums.items()}

    def result(self, tensor: SharedTensor, totals: Sums, sample: torch.Tensor) -> WeightStatistics:
        """Return the statistics of one tensor from its sums."""
        nan, infinite = int(totals["nan"]), int(totals["infinite"])
        finite = tensor.numel - nan - infinite
        return WeightStatistics(
            tensor.name,
            tensor.numel,
            nan,
            infinite,
            int(totals["dead"]) if has_rows(tensor) else None,
            totals["sum"].item() / finite if finite else math.nan,
            math.sqrt(totals["square"].item() / finite) if finite else math.nan,
            totals[LARGEST].item(),
        )


def has_rows(tensor: SharedTensor) -> bool:
    """Return True where rows are examined: in a matrix whose rows are not cut."""
    return len(tensor.shape) > 1 and tensor.row <= WIDEST_ROW
