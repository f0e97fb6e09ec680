"""ExPO: extrapolate an aligned model past the SFT model it was trained from.

Paper: Zheng et al., "Model Extrapolation Expedites Alignment", ACL 2025, arXiv 2404.16792.

    out = aligned + alpha · (aligned − sft)

alpha = 0 is the aligned model, alpha = −1 the SFT model. The same thing as task arithmetic on the base ``sft`` with
the single weight 1 + alpha. The released script computes in bfloat16 (three roundings); here the sum is taken in
float32 and rounded once. It also has no remedy for what that rounding does to a small alpha. Here the report's
effective alpha measures it: ⟨out − aligned, delta⟩ / ⟨delta, delta⟩ with delta = aligned − sft.

Taken from one iterate of a training run to the next (base: the previous one before it was extrapolated; alpha: the
momentum), the same step is Nesterov's, the way of APO (arXiv 2410.06293).
"""

from __future__ import annotations

from mergekit_lite.methods.contract import Merge, TensorInfo, step_from
from mergekit_lite.methods.registry import method
from mergekit_lite.ops.operations import Step


@method(
    given="fine-tunes",
    formula="aligned + alpha·(aligned − sft)",
    source="Zheng et al. 2025, arXiv 2404.16792",
    models=(1, 1),
    config_source="model",
    observed=Step(),
)
def expo(info: TensorInfo, *, alpha: float) -> Merge:
    """Extrapolate: the model is the one after alignment, the base the one before.

    Args:
        alpha: how far to go on; 0.1 to 0.5 suits most fully trained models, partly trained ones take more.
            0 and −1 give the two models themselves, to the bit.
    """
    # The small delta is scaled, not two large weights subtracted; and from the nearer of the two.
    return step_from(1, -alpha) if alpha > -0.5 else step_from(0, 1 + alpha)
