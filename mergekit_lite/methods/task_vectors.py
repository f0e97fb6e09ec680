"""Task arithmetic and what grew out of it: sparse deltas, added up or put to an election of signs.

Papers: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089; TIES, DARE, DELLA and
Model Breadcrumbs (see ``sparsify``).

    out = base + lambda · Σ w·S(δ)                               task_arithmetic, breadcrumbs, dare_linear, della_linear
    out = base + lambda · Σ w·S(δ)·[sign = elected]              ties, breadcrumbs_ties, dare_ties, della
    normalised: divided by Σ w, or by the Σ w of those that agree (1 where that is zero)

S drops elements (and rescales the rest). Signs are elected by the weighted sparse deltas.

Where others differ. The TIES paper trims over the whole model (``trim: global``), elects by unweighted deltas and
takes the mean. DARE and DELLA in their papers rescale by 1/probability (``rescale: density``), mergekit to the L1
length of the whole delta (``rescale: l1``, the default). mergekit rounds deltas, weights and result to the models'
dtype; here they are float32. Equal magnitudes, of which bfloat16 has many, it orders as its sort happens to: here the
lowest index is kept, and in DELLA they share their mean rank. Its DELLA ranks tensors of more than two axes along the
second one; here it is always the last.
"""

from __future__ import annotations

from typing import Annotated

from mergekit_lite.errors import UsageError
from mergekit_lite.methods.contract import Merge, Steps, TensorInfo
from mergekit_lite.methods.parameters import Doc, NotNegative, PerModel, Share
from mergekit_lite.methods.registry import last_axis, method
from mergekit_lite.methods.sparsify import Rescale, Trim, chance, inliers, magnitude, ranked_chance, rescaling
from mergekit_lite.ops.operations import Election, Masks, WeightedSum

ADDED = "base + lambda·Σ w·{}(x − base)"
ELECTED = "base + lambda·Σ w·{0}(x − base)·[sign elected]"
TIES, CRUMBS = "Yadav et al. 2023, arXiv 2306.01708", "Davari & Belilovsky 2024, arXiv 2312.06795"
DARE, DELLA = "Yu et al. 2024, arXiv 2311.03099", "Deep et al. 2024, arXiv 2406.11617"

# Parameters that several of the methods have.
Weight = Annotated[PerModel[float], Doc("of each model's delta.")]
Density = Annotated[PerModel[Share], Doc("share of each delta's elements that is kept.")]
MeanDensity = Annotated[PerModel[Share], Doc("share of each delta's elements that is kept (in the mean).")]
Gamma = Annotated[PerModel[Share], Doc("share of each delta's elements, the largest, that is dropped.")]
Epsilon = Annotated[
    PerModel[NotNegative],
    Doc("probabilities go from density − epsilon for a row's smallest element to density + epsilon."),
]
Normalize = Annotated[bool, Doc("divide by the weights.")]
NormalizeAgreeing = Annotated[bool, Doc("divide by the weights of those that agree.")]
Lambda = Annotated[float, Doc("scales what is added.")]
Rescaled = Annotated[Rescale, Doc("l1 or true (to the delta's L1 length), density (by 1/density), or false.")]
RescaledByRank = Annotated[Rescale, Doc("l1 or true (to the delta's L1 length), density (by 1/probability), or false.")]
Trimmed = Annotated[Trim, Doc("density counts in each tensor, or (global) in the whole model.")]


def _added(masks: Masks, factors: PerModel[float], weights: PerModel[float], normalize: bool, scale: float) -> Merge:
    divisor = sum(weights) if normalize else 1.0
    scale = scale / (divisor if abs(divisor) >= 1e-8 else 1.0)
    coefficients = tuple(weight * factor * scale for weight, factor in zip(weights, factors, strict=True))
    return WeightedSum(coefficients, from_base=True, masks=masks)


def _elected(masks: Masks, factors: PerModel[float], weights: PerModel[float], normalize: bool, scale: float) -> Merge:
    votes = tuple(weight * factor for weight, factor in zip(weights, factors, strict=True))
    return Election(votes, (1.0,) * len(votes), weights if normalize else None, scale, masks)


def _stay_probabilities(*, density: PerModel[float], epsilon: PerModel[float], **_: object) -> None:
    for share, reach in zip(density, epsilon, strict=True):
        if share < 1 and not 0 < share - reach <= share + reach < 1:
            raise UsageError(
                f"density {share:g} and epsilon {reach:g}: probabilities from {share - reach:g} to {share + reach:g}"
                " don't all lie between 0 and 1. Choose a smaller epsilon."
            )


@method(given="fine-tunes", formula=ADDED.format(""), source="Ilharco et al. 2023, arXiv 2212.04089")
def task_arithmetic(info: TensorInfo, *, weight: Weight, normalize: bool = False, lambda_: Lambda = 1.0) -> Merge:
    """Add the models' deltas to the base.

    Args:
        normalize: divide by the sum of the weights.
    """
    return _added((), (1.0,) * info.models, weight, normalize, lambda_)


@method(given="fine-tunes", formula=ELECTED.format("top"), source=TIES)
def ties(
    info: TensorInfo,
    *,
    weight: Weight,
    density: Density = (1.0,),
    normalize: NormalizeAgreeing = True,
    rescale: Rescaled = False,
    lambda_: Lambda = 1.0,
    trim: Trimmed = "tensor",
) -> Steps:
    """Trim each delta to its largest elements, elect signs, average what agrees."""
    masks = yield from magnitude(info, density, trim)
    factors = yield from rescaling(masks, density, rescale)
    return _elected(masks, factors, weight, normalize, lambda_)


@method(given="fine-tunes", formula=ADDED.format("inliers"), source=CRUMBS)
def breadcrumbs(
    info: TensorInfo,
    *,
    weight: Weight,
    density: Density = (1.0,),
    gamma: Gamma = (0.01,),
    normalize: Normalize = False,
    rescale: Rescaled = False,
    lambda_: Lambda = 1.0,
    trim: Trimmed = "tensor",
) -> Steps:
    """Drop each delta's largest and small elements, add the rest."""
    masks = yield from inliers(info, density, gamma, trim)
    factors = yield from rescaling(masks, density, rescale)
    return _added(masks, factors, weight, normalize, lambda_)


@method(given="fine-tunes", formula=ELECTED.format("inliers"), source=CRUMBS)
def breadcrumbs_ties(
    info: TensorInfo,
    *,
    weight: Weight,
    density: Density = (1.0,),
    gamma: Gamma = (0.01,),
    normalize: NormalizeAgreeing = False,
    rescale: Rescaled = False,
    lambda_: Lambda = 1.0,
    trim: Trimmed = "tensor",
) -> Steps:
    """Drop each delta's largest and small elements, elect signs, add what agrees."""
    masks = yield from inliers(info, density, gamma, trim)
    factors = yield from rescaling(masks, density, rescale)
    return _elected(masks, factors, weight, normalize, lambda_)


@method(given="fine-tunes", formula=ADDED.format("drop"), source=DARE)
def dare_linear(
    info: TensorInfo,
    *,
    weight: Weight,
    density: MeanDensity = (1.0,),
    normalize: Normalize = False,
    rescale: Rescaled = "l1",
    lambda_: Lambda = 1.0,
) -> Steps:
    """Drop elements of each delta at random, add the rest, rescaled."""
    masks = chance(info, density)
    factors = yield from rescaling(masks, density, rescale)
    return _added(masks, factors, weight, normalize, lambda_)


@method(given="fine-tunes", formula=ELECTED.format("drop"), source=DARE)
def dare_ties(
    info: TensorInfo,
    *,
    weight: Weight,
    density: MeanDensity = (1.0,),
    normalize: NormalizeAgreeing = False,
    rescale: Rescaled = "l1",
    lambda_: Lambda = 1.0,
) -> Steps:
    """Drop elements of each delta at random, rescale the rest, elect signs, add what agrees."""
    masks = chance(info, density)
    factors = yield from rescaling(masks, density, rescale)
    return _elected(masks, factors, weight, normalize, lambda_)


@method(given="fine-tunes", rows=last_axis, check=_stay_probabilities, formula=ELECTED.format("drop"), source=DELLA)
def della(
    info: TensorInfo,
    *,
    weight: Weight,
    density: MeanDensity = (1.0,),
    epsilon: Epsilon = (0.15,),
    normalize: NormalizeAgreeing = True,
    rescale: RescaledByRank = "l1",
    lambda_: Lambda = 1.0,
) -> Steps:
    """Drop elements of each delta at random, small ones more often, rescale the rest, elect signs, average."""
    masks = ranked_chance(info, density, epsilon, divide=rescale == "density")
    factors = yield from rescaling(masks, density, rescale if rescale != "density" else False)
    return _elected(masks, factors, weight, normalize, lambda_)


@method(given="fine-tunes", rows=last_axis, check=_stay_probabilities, formula=ADDED.format("drop"), source=DELLA)
def della_linear(
    info: TensorInfo,
    *,
    weight: Weight,
    density: MeanDensity = (1.0,),
    epsilon: Epsilon = (0.15,),
    normalize: Normalize = False,
    rescale: RescaledByRank = "l1",
    lambda_: Lambda = 1.0,
) -> Steps:
    """Drop elements of each delta at random, small ones more often, add the rest, rescaled."""
    masks = ranked_chance(info, density, epsilon, divide=rescale == "density")
    factors = yield from rescaling(masks, density, rescale if rescale != "density" else False)
    return _added(masks, factors, weight, normalize, lambda_)
