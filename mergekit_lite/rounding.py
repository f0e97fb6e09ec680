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
    # The exponent as frexp counts it, from the bits of float64; what is below its normal numbers has the least one.
    spacing = (exact.view(torch.int64) >> 52 & 0x7FF).sub_(1022 + precision).clamp_(min=smallest)
    up = draws.uniform(key, start, values.numel(), values.device)
    steps = (exact * _power_of_two(-spacing)).add_(up).floor_()
    return steps.mul_(_power_of_two(spacing)).copysign_(exact).to(dtype)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent in float64, put together from its bits: the same on every device, which pow need not be.

    ``exponents`` are int64, those of normal numbers: −1022 to 1023.
    """
    return (exponents + 1023 << 52).view(torch.float64)
