"""VaRM: each model's share is the share of change it brought, measured for one unit of the model at a time.

Paper: Wan et al., "FuseChat: Knowledge Fusion of Chat Models" (first version), 2024, arXiv 2402.16107, Eq. 7.

    w = mean(δ²) / (sum of it over the models), for each unit;   out = base + Σ w·δ

A unit is a tensor (the paper's choice), a module (``model.layers.3.mlp``), a layer, the model, or a single element. As
in the released code a module's or layer's figure is the sum of its tensors' means, the model's is the mean over all
elements, and tensors outside the layers get equal weights where the unit is a layer. With a ``temperature`` the weights
are the softmax of the figures divided by it.

Where the released code differs: its documented use gives every model weight 1/n, as one analysis file is read for all
of them. It gives all models equal weights in a unit that one of them leaves unchanged; here, as in the formula, that
model gets none there (and all get the same only where none changed anything). By elements it weights the models
instead of the deltas, and an element that no model changed becomes 0; here it stays what it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from mergekit_lite.deferred import np, torch
from mergekit_lite.methods.parameters import NotNegative
from mergekit_lite.methods.passes import (
    Block,
    Combine,
    Reduction,
    Steps,
    TensorInfo,
    Totals,
    Weighted,
    deltas,
    sum_of_deltas,
)
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.statistics import total
from mergekit_lite.ops import c_ops

IN_LAYER = re.compile(r"(?P<layer>(?:[^.]+\.)*?\d+)\.(?P<module>[^.]+)")

Measure = Literal["square", "abs"]


@method(formula="base + Σ w·δ, w ∝ mean δ²", source="Wan et al. 2024, arXiv 2402.16107")
def varm(
    info: TensorInfo,
    *,
    granularity: Literal["model", "layer", "module", "tensor", "element"] = "tensor",
    measure: Measure = "square",
    temperature: NotNegative = 0.0,
) -> Combine | Steps:
    """Add the models' deltas, each weighted by its share of the change.

    Args:
        info: the tensor.
        granularity: what one set of weights serves.
        measure: of change: mean square or mean magnitude.
        temperature: above 0, the weights are the softmax of the measures divided by it.
    """
    if granularity == "element":
        return lambda block, _: _by_element(block, measure, temperature)
    return _by_unit(info, granularity, measure, temperature)


def _by_unit(info: TensorInfo, granularity: str, measure: Measure, temperature: float) -> Steps:
    place = IN_LAYER.match(info.name)
    group = None
    if granularity == "model":
        group = f"varm {measure}"
    elif place is not None and granularity == "layer":
        group = f"varm {measure} {place['layer']}"
    elif place is not None and granularity == "module":
        group = f"varm {measure} {place[0]}"
    if granularity == "layer" and group is None:
        coefficients = (1 / info.models,) * info.models
    else:
        keeps = (c_ops.Keep(),) * info.models
        per_element = granularity == "model"
        tensor_share = 1.0 if per_element else 1 / info.numel

        def change(block: Block, _: int) -> torch.Tensor:
            changed = [total(delta.abs_()) if measure == "abs" else _square(delta) for delta in deltas(block)]
            return torch.stack([*changed, changed[0].new_tensor(block[0].numel())]) * tensor_share

        def change_by_kernel(block: Sequence[c_ops.Run], _: int) -> Totals:
            if measure == "abs":
                changed = c_ops.lengths(block, keeps, 0)[: info.models]
            else:
                changed = [c_ops.inner_products([block[0], model], has_base=True)[0] for model in block[1:]]
            return np.array([*changed, block[0].count]) * tensor_share

        changes = yield Reduction(change, group, kernel=change_by_kernel)
        coefficients = _shares(changes[:-1] / changes[-1] if per_element else changes[:-1], temperature)
    return Weighted(coefficients, sum_of_deltas(coefficients))


def _by_element(block: Block, measure: Measure, temperature: float) -> torch.Tensor:
    moved = torch.stack(deltas(block))
    changes = moved.square() if measure == "square" else moved.abs()
    if temperature > 0:
        weights = (changes / temperature).softmax(0)
    else:
        total = changes.sum(0)
        weights = torch.where(total > 0, changes / total, 1 / len(moved))
    return moved.mul_(weights).sum(0).add_(block[0])


def _square(delta: torch.Tensor) -> torch.Tensor:
    wide = delta.flatten().double()
    return torch.dot(wide, wide)


def _shares(changes: Totals, temperature: float) -> tuple[float, ...]:
    """Weights that sum to 1."""
    if temperature > 0:
        changes = np.exp((changes - changes.max()) / temperature)
    total = float(changes.sum())
    return tuple((changes / total).tolist()) if not total <= 0 else (1 / len(changes),) * len(changes)
