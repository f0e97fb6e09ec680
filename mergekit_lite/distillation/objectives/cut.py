"""CUT, contrastive unlikelihood training (2312.14591): of a criticised answer, unlearn what the criticism hits.

A judgment says what is wrong with an answer. The same answer is scored in two contexts: p⁺ of a token where the prompt
tells the judgment and asks for an answer that deserves it, p⁻ where it doesn't. Tokens that the judgment makes likelier
are what it speaks of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lite.distillation.objectives.logarithms import log1mexp


def criticised(judged: Tensor, plain: Tensor, threshold: float) -> Tensor:
    """Return (R,) bool: whether p⁺/p⁻ > τ, from the logarithms of p⁺ and p⁻ (R,) and τ = ``threshold``."""
    found: Tensor = (judged - plain).detach() > torch.log(judged.new_tensor(threshold))
    return found


def unlikelihood(judged: Tensor, plain: Tensor, threshold: float = 1.1, weight: float = 1.0) -> Tensor:
    """Return −w log(1 − p⁻) of criticised tokens and −log p⁻ of others.

    Args:
        judged: (R,); log p⁺, which gets no gradient.
        plain: (R,); log p⁻.
        threshold: τ; the paper's for answers of the model itself. Its is 1.2 for those of others.
        weight: w; likewise, 0.5 for those of others.

    Returns:
        (R,). Where 1 − p⁻ is 0, the released code has −w log 1e-5; here that is as large as the dtype can tell.
    """
    return torch.where(criticised(judged, plain, threshold), -weight * log1mexp(plain), -plain)
