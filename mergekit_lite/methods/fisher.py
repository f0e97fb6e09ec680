"""Fisher merging: an average of models in which each element counts by what is known of it. Needs statistics.

Paper: Matena & Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832.

    out = Σ w·c·(F + epsilon)·x / Σ w·c·(F + epsilon),   c = 1, or 1 / (‖F‖₂ + 1e-6) over the whole model (``balance``)

F is the diagonal of the Fisher information, which ``mergekit-lite statistics MODEL --prompts FILE --fisher`` writes:
the mean over examples of the squared gradient of a response's log-probability, which is the sum over its tokens. Each
model names its file by ``statistics``. The released code squares the gradient of a whole batch, which is right only for
batches of one example.

``epsilon`` is on the scale of F: where it is much larger than F, the merge is the average. Tensors that the files have
no F of (buffers, say) are averaged. Everything is elementwise: it takes the memory of an average, and reads the files
of statistics beside the models, four bytes for each parameter.
"""

from __future__ import annotations

from typing import Annotated

from mergekit_lite.deferred import torch
from mergekit_lite.methods.contract import Block, Merge, Reduction, Steps, TensorInfo
from mergekit_lite.methods.linear import have_a_mean, linear
from mergekit_lite.methods.parameters import Bounds, NotNegative, PerModel
from mergekit_lite.methods.registry import method

NORM_EPSILON = 1e-6  # of the released code: added to the length of F


@method(
    given="data",
    base="none",
    statistics="fisher",
    check=have_a_mean,
    formula="Σ w·(F + epsilon)·x / Σ w·(F + epsilon)",
    source="Matena & Raffel 2022, arXiv 2111.09832",
)
def fisher(
    info: TensorInfo,
    *,
    weight: PerModel[NotNegative] = (1.0,),
    epsilon: Annotated[float, Bounds(1e-30)] = 1e-6,
    balance: bool = False,
) -> Merge | Steps:
    """Average models, each element weighted by its Fisher information.

    Args:
        weight: of each model.
        epsilon: added to F, so that elements which no model is sure of are averaged.
        balance: divide each model's F by its length over the whole model, so that no model outweighs the others.
    """
    if not info.fisher:
        return linear(info, weight=weight)
    return _balanced(info, weight, epsilon) if balance else _weighted(weight, epsilon)


def _balanced(info: TensorInfo, weight: tuple[float, ...], epsilon: float) -> Steps:
    squares = yield Reduction(
        lambda block, _: torch.stack([f.double().square().sum() for f in block[info.models :]]), group="fisher"
    )
    scales = [w / (float(square) ** 0.5 + NORM_EPSILON) for w, square in zip(weight, squares, strict=True)]
    return _weighted(scales, epsilon)


def _weighted(weight: tuple[float, ...] | list[float], epsilon: float) -> Merge:
    def merged(block: Block, _: int) -> torch.Tensor:
        # As the first model and what the others add: where all agree, the result is theirs to the bit.
        first, models = block[0], len(weight)
        added, total = torch.zeros_like(first), torch.zeros_like(first)
        for scale, x, f in zip(weight, block[:models], block[models:], strict=True):
            sureness = (f + epsilon) * scale
            added += (x - first) * sureness
            total += sureness
        return first + added / total

    return merged
