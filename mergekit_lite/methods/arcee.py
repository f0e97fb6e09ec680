"""Arcee fusion: take over from the model only the elements whose change stands out.

Source: arcee-ai/mergekit (``arcee_fusion``).

    s = |x − base| · KL(softmax(x's row) ‖ softmax(base's row));   q = the quartiles of s over the tensor
    out = x where s ≥ q₂ + 1.5·(q₃ − q₁), else base

mergekit estimates the quartiles from a million samples on larger tensors, so that its result depends on a global random
state, and returns float32; here they are exact and the result is rounded like every other. The divergence of two
nearly equal rows is far below the rounding errors of its terms in 16 or 32 bits, so it is computed in float64.
"""

from __future__ import annotations

from mergekit_lite.deferred import torch
from mergekit_lite.methods.contract import Block, Reduction, Steps, TensorInfo
from mergekit_lite.methods.registry import last_axis, method
from mergekit_lite.methods.statistics import largest


@method(
    given="fine-tunes",
    models=(1, 1),
    rows=last_axis,
    formula="x where |x − base|·KL(row) ≥ q₂ + 1.5·(q₃ − q₁), else base",
    source="mergekit",
)
def arcee_fusion(info: TensorInfo) -> Steps:
    """Give the base the model's elements where their change stands out.

    Args:
        info: the tensor; its rows are along the last axis.
    """
    columns = last_axis(info.shape)
    rows = info.numel // max(columns, 1)

    def divergences(block: Block, start: int) -> torch.Tensor:
        p, q = (tensor.double().softmax(1).add_(1e-8) for tensor in (block[1], block[0]))
        row = start // columns
        of_rows = torch.zeros(rows, dtype=torch.float64, device=p.device)
        of_rows[row : row + len(p)] = ((p / q).log_().mul_(p)).sum(1).clamp_(min=0)
        return of_rows

    by_row = yield Reduction(divergences)

    def scores(block: Block, start: int) -> torch.Tensor:
        row = start // columns
        here = torch.from_numpy(by_row[row : row + len(block[0]), None]).to(block[0].device)
        return ((block[1] - block[0]).abs_().double() * here).float()

    def counts(_: int, elements: int, __: int) -> list[int]:
        return [elements - int(quarter * (elements - 1)) for quarter in (0.25, 0.5, 0.75)]

    [quartiles] = yield from largest(info, lambda block, start: [scores(block, start)], counts, sampled=False)
    first, median, third = (cut.threshold for cut in quartiles)
    outstanding = median + 1.5 * (third - first)

    def combine(block: Block, start: int) -> torch.Tensor:
        return torch.lerp(block[0], block[1], scores(block, start).ge_(outstanding).to(block[0].dtype))

    return combine
