"""From the working dtype to the output dtype: rounded once, to nearest or stochastically."""

from __future__ import annotations

from mergekit_lite import draws, dtypes
from mergekit_lite.deferred import torch

ROUNDINGS = ("nearest", "stochastic")

# significant bits (with the implicit one) and the exponent of the smallest subnormal
GRIDS = {"bfloat16": (8, -133), "float16": (11, -24), "float32": (24, -149)}


def stochastic(values: torch.Tensor, dtype: torch.dtype, key: int, start: int) -> torch.Tensor:
    """Round each value to one of its two neighbours in ``dtype``, up with the probability that makes the mean exact.

    A step much smaller than the spacing of ``dtype`` so survives on average, where rounding to nearest would undo it.
    (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision".)

    Args:
        values: 1-D, float32 or float64.
        dtype: bfloat16, float16 or float32; wider ones have no need of it and are cast.
        key: the tensor's key, from ``draws.stream_key``.
        start: index of the first value in its tensor.

    Returns:
        ``dtype`` tensor of the same shape; what was representable stays as it is, NaN and infinity too.
    """
    name = dtypes.name_of(dtype)
    if name not in GRIDS or values.dtype == dtype:
        return values.to(dtype)
    precision, smallest = GRIDS[name]
    exact = values.to(torch.float64)
    spacing = (torch.frexp(exact).exponent - precision).clamp_(min=smallest)
    up = draws.uniform(key, start, values.numel(), values.device)
    steps = torch.ldexp(exact, -spacing).add_(up).floor_()
    return torch.ldexp(steps, spacing).copysign_(exact).to(dtype)
