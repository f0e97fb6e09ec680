"""ExPO: extrapolate an aligned model past the SFT model it was trained from.

Paper: Zheng et al., "Model Extrapolation Expedites Alignment", ACL 2025, arXiv 2404.16792.

    out = aligned + alpha · (aligned − sft)

alpha = 0 is the aligned model, alpha = −1 the SFT model. The same thing as task arithmetic on the base ``sft`` with
the single weight 1 + alpha. The released script computes in bfloat16 (three roundings); here the sum is taken in
float32 and rounded once. It also has no remedy for what that rounding does to a small alpha: ``effect`` measures it.

Taken from one iterate of a training run to the next (base: the previous one before it was extrapolated; alpha: the
momentum), the same step is Nesterov's, the way of APO (arXiv 2410.06293).
"""

from __future__ import annotations

from mergekit_lite.deferred import torch
from mergekit_lite.methods.registry import method


def effect(out: torch.Tensor, aligned: torch.Tensor, sft: torch.Tensor) -> tuple[float, float]:
    """What became of alpha in one block: ⟨out − aligned, delta⟩ and ⟨delta, delta⟩, with delta = aligned − sft.

    The quotient of the two (summed over blocks) is the alpha that the written model really has.
    """
    origin = aligned.double()
    delta = origin - sft.double()
    return torch.dot(out.double() - origin, delta).item(), torch.dot(delta, delta).item()


@method(
    formula="aligned + alpha·(aligned − sft)",
    source="Zheng et al. 2025, arXiv 2404.16792",
    models=(1, 1),
    elementwise=True,
    rounds_once=True,
    donor="model",
    observe=effect,
)
def expo(aligned: torch.Tensor, sft: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """Extrapolate one block.

    Args:
        aligned: the model after alignment, any float dtype.
        sft: the model before, same shape and dtype.
        alpha: how far to go on; 0.1 to 0.5 suits most fully trained models, partly trained ones take more.

    Returns:
        Same shape and dtype. alpha 0 and −1 give ``aligned`` and ``sft`` themselves, to the bit.
    """
    if alpha == 0:
        return aligned
    if alpha == -1:
        return sft
    # In this direction lerp is aligned − alpha·(sft − aligned): the small delta is scaled, not two large weights
    # subtracted.
    return torch.lerp(aligned, sft, -alpha)
