"""Logarithms that stay exact where the plain formula loses all digits."""

from __future__ import annotations

import torch
from torch import Tensor


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) for x < 0, exact at both ends (Mächler 2012); x = 0 stands for the number next to it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931471805599453  # −log 2
    # Each branch gets only values that it is exact for: elsewhere its gradient would be infinity times 0.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))
