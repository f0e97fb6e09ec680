"""Methods that settle each element by itself: nearswap, magmax, consensus (TALL masks), RAM and RAM+.

Papers: Marczak et al., "MagMax", ECCV 2024, arXiv 2407.06322; Wang et al., "Localizing Task Information for Improved
Model Merging and Compression", ICML 2024, arXiv 2405.07813 (consensus); RAM: arXiv 2601.13572; nearswap is
Alchemonaut's.

mergekit's RAM+ returns float32 whatever it is given; here the result is rounded like every other.
"""

from __future__ import annotations

from mergekit_lite.deferred import np, torch
from mergekit_lite.methods.contract import Block, Merge, Reduction, Steps, TensorInfo
from mergekit_lite.methods.parameters import Count, NotNegative, PerModel
from mergekit_lite.methods.registry import method
from mergekit_lite.ops.torch_ops import deltas, weighted_sum


@method(given="fine-tunes", models=(1, 1), formula="base + clamp(x − base, −t, t)", source="Alchemonaut, mergekit")
def nearswap(info: TensorInfo, *, t: NotNegative) -> Merge:
    """Go from the base to the model, but in no element further than ``t``.

    mergekit's weight clamp(t/|x − base|, 0, 1) on the difference is the same thing without the division.

    Args:
        t: how far.
    """
    return lambda block, _: (block[1] - block[0]).clamp_(-t, t).add_(block[0])


@method(
    given="fine-tunes", formula="base + lambda·(δ with the largest |δ|)", source="Marczak et al. 2024, arXiv 2407.06322"
)
def magmax(info: TensorInfo, *, lambda_: float = 1.0) -> Merge:
    """Add per element the delta of the model that changed it most; of equal ones the first model's.

    Args:
        lambda_: scales what is added.
    """

    def combine(block: Block, _: int) -> torch.Tensor:
        most, *others = deltas(block)
        for delta in others:
            more = torch.gt(delta.abs(), most.abs(), out=torch.empty_like(most))
            most = torch.lerp(most, delta, more)
        return most.mul_(lambda_).add_(block[0])

    return combine


@method(
    given="fine-tunes",
    formula="base + lambda·Σδ·[at least agree of |δ| ≥ threshold·|Σδ − δ|]",
    source="Wang et al. 2024, arXiv 2405.07813",
)
def consensus(
    info: TensorInfo, *, threshold: PerModel[float] = (0.4,), agree: Count = 2, lambda_: float = 1.0
) -> Merge:
    """Add up the deltas, but only where enough models have a stake in it (TALL masks).

    Args:
        threshold: a model has a stake where its delta is at least this many times what the others add up to. The paper
            chooses it for each model from 0.2 to 0.6.
        agree: how many must have one; the paper's is 2.
        lambda_: scales what is added.
    """

    def combine(block: Block, _: int) -> torch.Tensor:
        moved = deltas(block)
        total = weighted_sum(moved, (1.0,) * len(moved))
        stakes, mask = torch.zeros_like(total), torch.empty_like(total)
        for delta, factor in zip(moved, threshold, strict=True):
            others = (total - delta).abs_().mul_(factor)
            stakes.add_(torch.ge(delta.abs_(), others, out=mask))
        return total.mul_(stakes.ge_(agree)).mul_(lambda_).add_(block[0])

    return combine


@method(given="fine-tunes", formula="base + Σ δ·[|δ| > epsilon] / (how many are)", source="arXiv 2601.13572")
def ram(info: TensorInfo, *, epsilon: NotNegative = 1e-5) -> Merge:
    """Keep what one model changed, average what several did.

    Args:
        epsilon: what is not larger counts as unchanged.
    """
    return lambda block, _: _shared_mean(block, epsilon, (1.0,) * info.models)


@method(
    given="fine-tunes",
    formula="as ram; what one model alone changed times 1 + r·clamp(shared/unique, 0, alpha)",
    source="arXiv 2601.13572",
)
def ramplus_tl(info: TensorInfo, *, epsilon: NotNegative = 1e-5, r: float = 0.1, alpha: float = 0.2) -> Steps:
    """Merge as ``ram``, and enlarge what one model alone changed, by how much of its change in the tensor is shared.

    Args:
        epsilon: what is not larger counts as unchanged.
        r: how strongly.
        alpha: most that the ratio of shared to unique elements counts.
    """

    def count(block: Block, _: int) -> torch.Tensor:
        changed = torch.stack([delta.abs_() > epsilon for delta in deltas(block)])
        alone = changed.sum(0) == 1
        unique = (changed & alone).flatten(1).sum(1)
        return torch.stack([changed.flatten(1).sum(1) - unique, unique])

    shared, unique = yield Reduction(count)
    factors = 1 + r * np.clip(shared / np.maximum(unique, 1), 0, alpha)
    return lambda block, _: _shared_mean(block, epsilon, tuple(factors.tolist()))


def _shared_mean(block: Block, epsilon: float, alone: tuple[float, ...]) -> torch.Tensor:
    """Return the base plus the mean of the deltas that changed an element, times ``alone`` where only one did."""
    moved = deltas(block)
    changes = torch.zeros_like(moved[0])
    total, scaled = torch.zeros_like(changes), torch.zeros_like(changes)
    for delta, factor in zip(moved, alone, strict=True):
        changed = torch.gt(delta.abs(), epsilon, out=torch.empty_like(delta))
        changes.add_(changed)
        delta.mul_(changed)
        total.add_(delta)
        scaled.add_(delta, alpha=factor)
    single = torch.eq(changes, 1, out=torch.empty_like(changes))
    mean = total.div_(changes.clamp_(min=1))
    return torch.lerp(mean, scaled, single).add_(block[0])
