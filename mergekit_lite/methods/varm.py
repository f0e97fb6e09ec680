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
from typing import Literal

from mergekit_lite.deferred import np, torch
from mergekit_lite.methods.contract import Block, Merge, Reduction, Steps, TensorInfo, Totals, WithCoefficients
from mergekit_lite.methods.parameters import NotNegative
from mergekit_lite.methods.registry import method
from mergekit_lite.ops.operations import Sizes, WeightedSum
from mergekit_lite.ops.torch_ops import deltas

IN_LAYER = re.compile(r"(?P<layer>(?:[^.]+\.)*?\d+)\.(?P<module>[^.]+)")

Measure = Literal["square", "abs"]


@method(given="fine-tunes", formula="base + Σ w·δ, w ∝ mean δ²", source="Wan et al. 2024, arXiv 2402.16107")
def varm(
    info: TensorInfo,
    *,
    granularity: Literal["model", "layer", "module", "tensor", "element"] = "tensor",
    measure: Measure = "square",
    temperature: NotNegative = 0.0,
) -> Merge | Steps:
    """Add the models' deltas, each weighted by its share of the change.

    Args:
        granularity: what one set of weights serves.
        measure: of change: mean square or mean magnitude.
        temperature: above 0, the weights are the softmax of the measures divided by it.
    """
    if granularity == "element":
        return lambda block, _: _by_element(block, measure, temperature)
    return _by_unit(info, granularity, measure, temperature)


def _by_unit(info: TensorInfo, granularity: str, measure: Measure, temperature: float) -> Steps:
    group = f"varm {measure}" if granularity == "model" else None
    if granularity in ("layer", "module") and (place := IN_LAYER.match(info.name)) is not None:
        group = f"varm {measure} {place['layer'] if granularity == 'layer' else place[0]}"
    if granularity == "layer" and group is None:
        coefficients = (1 / info.models,) * info.models
    else:
        per_element = granularity == "model"
        sizes = Sizes(squared=measure == "square", factor=1.0 if per_element else 1 / info.numel)
        changes = yield Reduction(sizes, group)
        coefficients = _shares(changes[:-1] / changes[-1] if per_element else changes[:-1], temperature)
    return WithCoefficients(coefficients, WeightedSum(coefficients, from_base=True))


def _by_element(block: Block, measure: Measure, temperature: float) -> torch.Tensor:
    moved = torch.stack(deltas(block))
    changes = moved.square() if measure == "square" else moved.abs()
    if temperature > 0:
        weights = (changes / temperature).softmax(0)
    else:
        total = changes.sum(0)
        weights = torch.where(total > 0, changes / total, 1 / len(moved))
    return moved.mul_(weights).sum(0).add_(block[0])


def _shares(changes: Totals, temperature: float) -> tuple[float, ...]:
    """Return the weights: shares of the changes, or their softmax; they sum to 1."""
    if temperature > 0:
        changes = np.exp((changes - changes.max()) / temperature)
    total = float(changes.sum())
    return tuple((changes / total).tolist()) if not total <= 0 else (1 / len(changes),) * len(changes)
