"""SCE: select where the models disagree, calculate each one's share from it, erase minority signs.

Paper: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024, arXiv 2408.07990, Algorithm 1.

    select     d = δ where the variance over the models is among the ⌊select_topk·(elements that vary)⌋ largest, else 0
    calculate  η = Σ d² / (sum of it over the models), one number for each model and tensor
    erase      per element, drop what has not the sign of the sum
    merge      base + Σ η·d (over those that agree), divided by Σ η of those that agree

There are three SCEs, told apart by ``variant``:

=========  ==============================================  ===========================
variant    what is merged                                  divided by Σ η of the rest
=========  ==============================================  ===========================
mergekit   the selected elements (d)                       yes
fusechat   all of δ; the selection serves η only           yes
paper      the selected elements (d)                       no
=========  ==============================================  ===========================

``fusechat`` is the authors' released code, with which FuseChat-7B-v2.0 was made. Where mergekit (0.1.5) differs from
its own column: it takes uniform η when the mean squares sum to less than 1e-6, which they do for most real fine-tunes
(their deltas' root mean square is 1e-6 to 5e-4), so that it silently averages. Here η is uniform only where no selected
element differs from the base, so scaling all deltas leaves η as it is.
Sums of zero elect +; of equal variances the lowest index wins. No weights: SCE finds its own.
"""

from __future__ import annotations

from typing import Literal

from mergekit_lite.deferred import torch
from mergekit_lite.methods.contract import Block, Reduction, Steps, TensorInfo, WithCoefficients
from mergekit_lite.methods.parameters import Share
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.statistics import gram, largest
from mergekit_lite.ops.operations import Cut, Election
from mergekit_lite.ops.torch_ops import deltas


@method(
    given="fine-tunes",
    formula="base + Σ η·δ·[sign elected] / Σ η·[sign elected], η ∝ Σ δ²",
    source="Wan et al. 2024, arXiv 2408.07990",
)
def sce(
    info: TensorInfo, *, select_topk: Share = 1.0, variant: Literal["mergekit", "fusechat", "paper"] = "mergekit"
) -> Steps:
    """Merge deltas by coefficients that follow from where the models disagree.

    Args:
        select_topk: share of the elements that vary between the models, those with the largest variance, to select.
        variant: whose SCE (see the module).
    """
    cut: Cut | None = None
    if select_topk < 1:
        [[cut]] = yield from largest(
            info, lambda block, _: [_variance(block[1:])], lambda _, elements, vary: [int(select_topk * vary)]
        )

    def selected(block: Block, start: int) -> Block:
        assert cut is not None
        mask = cut.mask(_variance(block[1:]), start)
        return [delta.mul_(mask) for delta in deltas(block)]

    def squares(block: Block, start: int) -> torch.Tensor:
        wide = (delta.double() for delta in selected(block, start))
        return torch.stack([torch.dot(delta, delta) for delta in wide])

    of_model = (yield from gram(from_base=True)).diagonal() if cut is None else (yield Reduction(squares))
    whole = sum(of_model.tolist())
    shares = tuple(square / whole for square in of_model.tolist()) if whole > 0 else (1 / info.models,) * info.models
    return WithCoefficients(
        shares,
        Election(
            votes=(1.0,) * info.models,
            shares=shares,
            weights=None if variant == "paper" else shares,
            kept=() if cut is None or variant == "fusechat" else selected,
        ),
    )


def _variance(models: Block) -> torch.Tensor:
    """Return per element n² times the variance over the models, as float32.

    Seen from the first model: the same whatever the base, and zero where all agree, not nearly zero.
    """
    if len(models) == 1:
        return torch.zeros_like(models[0], dtype=torch.float32)
    apart = [model - models[0] for model in models[1:]]
    if len(apart) == 1:
        return apart[0].square_().float()
    total = apart[0].clone()
    for one in apart[1:]:
        total.add_(one)
    squares = apart[0].square_()
    for one in apart[1:]:
        squares.addcmul_(one, one)
    return squares.mul_(len(models)).sub_(total.square_()).clamp_(min=0).float()
