"""Matrices as FP8 codes with a scale for each block of 128 × 128, as DeepSeek-V3 has them: the one quantised output.

Value = code · scale. Stored are ``X.weight``, float8_e4m3fn, and ``X.weight_scale_inv``, float32, one for each block;
see ``weight_dequant`` in https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_lite.deferred import torch

NAME = "fp8"  # as an output dtype
CODES, SCALES = "float8_e4m3fn", "float32"
BESIDE = "bfloat16"  # of what is not quantised
SCALE_ENDING = "_scale_inv"
EDGE = 128  # of a block, in rows and columns
BLOCK = EDGE * EDGE
LARGEST_CODE = 448.0
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: a smaller one would round away what it divides


def quantised(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise whole blocks, to nearest.

    Args:
        values: (rows, columns), float32; multiples of 128.

    Returns:
        codes: (rows, columns), float8_e4m3fn.
        scales: (rows / 128, columns / 128), float32: the largest size in a block becomes the largest code, 448. One
            where all of a block is zero, NaN where something in it is.
    """
    blocks = _blocks(values)
    largest = blocks.abs().amax((1, 3))
    scales = torch.where(largest == 0, 1.0, (largest / LARGEST_CODE).clamp(min=SMALLEST_SCALE))
    codes = (blocks / scales[:, None, :, None]).clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)
    return codes.view(values.shape), scales


def dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the values of whole blocks: (rows, columns), float32."""
    return (_blocks(codes).float() * scales[:, None, :, None]).view(codes.shape)


def squared_error(values: torch.Tensor, written: torch.Tensor) -> tuple[float, float]:
    """Return the sums of squares of what quantising changed, and of the values.

    They are added up by rows of blocks, so that they are the same however a matrix is cut.
    """
    change = size = 0.0
    for exact, coarse in zip(values.split(EDGE), written.split(EDGE), strict=True):
        change += _sum_of_squares(exact - coarse)
        size += _sum_of_squares(exact)
    return change, size


def config_section(not_quantised: Sequence[str]) -> dict[str, Any]:
    """Return ``quantization_config`` of the config, where some modules are not quantised."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [EDGE, EDGE],
        "modules_to_not_convert": list(not_quantised),
    }


def _sum_of_squares(values: torch.Tensor) -> float:
    wide = values.double().flatten()
    return float(torch.dot(wide, wide))


def _blocks(matrix: torch.Tensor) -> torch.Tensor:
    """Return a view of a matrix: (rows of blocks, 128, columns of blocks, 128)."""
    return matrix.view(-1, EDGE, matrix.shape[1] // EDGE, EDGE)
