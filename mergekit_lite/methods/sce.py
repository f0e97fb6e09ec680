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

from collections.abc import Sequence
from typing import Literal

from mergekit_lite.deferred import torch
from mergekit_lite.methods.election import elected
from mergekit_lite.methods.parameters import Share
from mergekit_lite.methods.passes import Block, Compiled, Reduction, Steps, TensorInfo, Weighted, deltas
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.statistics import Cut, gram, largest
from mergekit_lite.ops import c_ops


@method(
    formula="base + Σ η·δ·[sign elected] / Σ η·[sign elected], η ∝ Σ δ²", source="Wan et al. 2024, arXiv 2408.07990"
)
def sce(
    info: TensorInfo,
    *,
    select_topk: Share = 1.0,
    variant: Literal["mergekit", "fusechat", "paper"] = "mergekit",
) -> Steps:
    """Merge deltas by coefficients that follow from where the models disagree.

    Args:
        info: the tensor.
        select_topk: share of the elements that vary between the models, those with the largest variance, to select.
        variant: whose SCE (see the module).
    """
    cut = None
    if select_topk < 1:
        [[cut]] = yield from largest(
            info, lambda block, _: [_variance(block[1:])], lambda _, elements, vary: [int(select_topk * vary)]
        )

    def selected(block: Block, start: int, cut: Cut | None = cut) -> Block:
        made = deltas(block)
        if cut is not None:
            mask = cut.mask(_variance(block[1:]), start)
            for delta in made:
                delta.mul_(mask)
        return made

    def squares(block: Block, start: int) -> torch.Tensor:
        wide = (delta.double() for delta in selected(block, start))
        return torch.stack([torch.dot(delta, delta) for delta in wide])

    total = ((yield from gram(from_base=True)).diagonal() if cut is None else (yield Reduction(squares))).tolist()
    whole = sum(total)
    shares = tuple(square / whole for square in total) if whole > 0 else (1 / info.models,) * info.models

    shown = None if variant == "fusechat" else cut
    votes, divided = (1.0,) * info.models, None if variant == "paper" else shares
    keeps = (c_ops.Keep(),) * info.models

    def combine(block: Block, start: int) -> torch.Tensor:
        return elected(block[0], selected(block, start, shown), votes, shares, divided)

    def kernel(block: Sequence[c_ops.Run], start: int, out: c_ops.Run) -> None:
        c_ops.merge_elected(out, block, votes, shares, divided, 1.0, keeps, start)

    return Weighted(shares, combine if shown is not None else Compiled(combine, kernel))


def _variance(models: Block) -> torch.Tensor:
    """Per element, n² times the variance over the models, as float32.

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
