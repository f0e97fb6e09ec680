"""Model Stock: how far to trust the mean of several fine-tunes, from the angle between them.

Paper: Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024, arXiv 2403.19522.

    c = mean of cos(δᵢ, δⱼ) over pairs;   t = n·c / (1 + (n−1)·c);   out = base + t·mean(δ)

mergekit computes this in the models' own dtype and takes the cosine as zero for deltas whose lengths multiply to less
than 1e-6; here the deltas' inner products are summed in float64, and only a zero delta has cosine zero. Where
1 + (n−1)·c vanishes, t is 0, as in mergekit.
"""

from __future__ import annotations

import math

from mergekit_lite.deferred import np, torch
from mergekit_lite.methods.contract import Block, Steps, TensorInfo, Totals
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.statistics import gram
from mergekit_lite.ops.operations import WeightedSum
from mergekit_lite.ops.torch_ops import deltas, weighted_sum


def _trust(products: Totals) -> Totals:
    """Return the factor t from the deltas' inner products, float64 of shape (…, n, n)."""
    count = products.shape[-1]
    squares = np.diagonal(products, axis1=-2, axis2=-1)
    lengths = np.sqrt(squares[..., :, None] * squares[..., None, :])
    cosines = np.clip(np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), 0), -1, 1)
    mean = np.triu(cosines, 1).sum((-1, -2)) / (count * (count - 1) / 2)
    divisor = 1 + (count - 1) * mean
    vanishes = np.abs(divisor) < 1e-6
    return np.where(vanishes, 0, count * mean / np.where(vanishes, 1, divisor))


def _filters(shape: tuple[int, ...], *, filter_wise: bool) -> int:
    """Return the length of a filter, which is all that one index of the first axis holds; a vector is a single one."""
    return math.prod(shape[1:] if len(shape) > 1 else shape) if filter_wise else 0


@method(
    given="fine-tunes",
    models=(2, None),
    rows=_filters,
    formula="base + t·mean(x − base)",
    source="Jang et al. 2024, arXiv 2403.19522",
)
def model_stock(info: TensorInfo, *, filter_wise: bool = False) -> Steps:
    """Take the mean of at least two fine-tunes, drawn back to their base the more, the wider the angle between them.

    Args:
        filter_wise: an angle for each row instead of one for the tensor.
    """
    if filter_wise:

        def by_rows(block: Block, _: int) -> torch.Tensor:
            moved = deltas(block)
            stacked = torch.stack(moved, 1).double()  # (rows, models, columns)
            trust = torch.from_numpy(_trust((stacked @ stacked.mT).cpu().numpy())).to(block[0])
            return weighted_sum(moved, (1 / info.models,) * info.models).mul_(trust[:, None]).add_(block[0])

        return by_rows
    products = yield from gram(from_base=True)
    share = float(_trust(products)) / info.models
    return WeightedSum((share,) * info.models, from_base=True)
