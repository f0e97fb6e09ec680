"""Weighted sums of whole models: averages, soups, interpolations, and one tensor passed through.

Papers: Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482; Wortsman et al., "Robust fine-tuning of zero-shot
models" (WiSE-FT), CVPR 2022, arXiv 2109.01903; Huang et al., "Chat Vector", ACL 2024, arXiv 2310.04799.

    out = Σ w·x   (divided by Σ w where normalised)

mergekit's ``linear`` makes NaN where the weights sum to zero; here that is an error before anything is read.
"""

from __future__ import annotations

from mergekit_lite.errors import UsageError
from mergekit_lite.methods.contract import Merge, TensorInfo, step_from
from mergekit_lite.methods.parameters import PerInput, Share
from mergekit_lite.methods.registry import method
from mergekit_lite.ops.operations import WeightedSum


def shares(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Return the weights divided by their sum. Raises UsageError where that is zero."""
    total = sum(weights)
    if total == 0:
        raise UsageError(f"The weights {', '.join(f'{w:g}' for w in weights)} sum to zero: there is no mean with them.")
    return tuple(weight / total for weight in weights)


def have_a_mean(
    *, weight: tuple[float, ...], normalize: bool = True, normalize_weights: bool = True, **_: object
) -> None:
    """Raise UsageError where weights are to be divided by their sum, and that is zero."""
    if normalize and normalize_weights:
        shares(weight)


@method(
    given="models",
    base="optional",
    check=have_a_mean,
    formula="Σ w·x / Σ w",
    source="Wortsman et al. 2022, arXiv 2203.05482",
)
def linear(info: TensorInfo, *, weight: PerInput[float], normalize: bool = True) -> Merge:
    """Take the weighted sum of the inputs; a base is one of them.

    Args:
        weight: of each input.
        normalize: divide by the sum of the weights.
    """
    if not normalize:
        return WeightedSum(weight)
    # Means of 16-bit values often lie halfway between two of them. Summed first and divided then they still do.
    weights = weight if len(set(weight)) > 1 else (1.0,) * len(weight)
    return WeightedSum(weights, divisor=sum(weights))


@method(given="models", base="optional", formula="mean of x", source="Wortsman et al. 2022, arXiv 2203.05482")
def uniform_soup(info: TensorInfo) -> Merge:
    """Take the plain mean of the inputs; a base is one of them."""
    return linear(info, weight=(1.0,) * info.inputs)


@method(given="run", base="optional", formula="m ← decay·m + (1 − decay)·x, in order", source="Polyak & Juditsky 1992")
def ema(info: TensorInfo, *, decay: Share = 0.9) -> Merge:
    """Take the exponential moving average of checkpoints in their order, from the first one (the base, if any) on.

    Args:
        decay: what an average keeps when the next checkpoint comes.
    """
    later = info.inputs - 1
    weights = (decay**later, *((1 - decay) * decay ** (later - i) for i in range(1, later + 1)))
    return linear(info, weight=weights, normalize=False)


@method(
    given="fine-tunes", models=(1, 1), formula="(1 − alpha)·base + alpha·x", source="Wortsman et al., arXiv 2109.01903"
)
def wise_ft(info: TensorInfo, *, alpha: float = 0.5) -> Merge:
    """Interpolate between a base and its fine-tune.

    Args:
        alpha: 0 is the base, 1 the fine-tune.
    """
    return step_from(0, alpha) if alpha < 0.5 else step_from(1, 1 - alpha)  # from the nearer end: both are met exactly


@method(
    given="fine-tunes", models=(2, 2), formula="x₁ + scale·(x₂ − base)", source="Huang et al. 2024, arXiv 2310.04799"
)
def chat_vector(info: TensorInfo, *, scale: float = 1.0) -> Merge:
    """Add to a model, say one trained on in another language, what a chat model learnt over their common base.

    Args:
        info: the tensor; the first model listed gains it, the second one is the chat model.
        scale: how much of it.
    """
    return WeightedSum((1.0, scale), from_base=True)


@method(given="models", base="none", models=(1, 1), formula="scale·x", source="mergekit")
def passthrough(info: TensorInfo, *, scale: PerInput[float] = (1.0,)) -> Merge:
    """Pass one model's tensor through as it is, or scaled.

    Args:
        scale: a factor; 1 copies every bit.
    """
    return WeightedSum(scale)
