"""Recognise NVFP4 as NVIDIA's ModelOpt exports it: ``X.weight``, ``X.weight_scale`` and ``X.weight_scale_2``.

The values are those of its ``NVFP4QTensor.dequantize`` in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from mergekit_lite.checkpoint.encodings.block_scaled import BlockScaled
from mergekit_lite.checkpoint.encodings.lookup import Nibbles
from mergekit_lite.checkpoint.encodings.two_level import TwoLevel
from mergekit_lite.checkpoint.schemes.scheme import ORIGINAL, Quantised, Stored, part, quantised
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError

WEIGHT, LOCAL, GENERAL = ".weight", "_scale", "_scale_2"
GROUP = 16  # elements of a row that share a local scale
SMOOTHED = ".pre_quant_scale"


def recognise(stored: Stored) -> Iterator[Quantised]:
    """Yield the matrices of 4-bit floats."""
    for name, spec in stored.tensors.items():
        if spec.dtype == "uint8" and name.endswith(WEIGHT) and name + GENERAL in stored.tensors:
            parts = {name + ending: "scale" for ending in (LOCAL, GENERAL) if name + ending in stored.tensors}
            smoothed = name.removesuffix(WEIGHT) + SMOOTHED
            parts |= {smoothed: "scale of activations"} if smoothed in stored.tensors else {}
            yield quantised(name, parts, partial(_shown, spec, stored))


def _shown(spec: TensorSpec, stored: Stored) -> TensorSpec:
    smoothed = spec.name.removesuffix(WEIGHT) + SMOOTHED
    if smoothed in stored.tensors:
        raise CheckpointError(
            f"{spec.name}: its activations are scaled by {smoothed}, so its values aren't those of the model that it "
            f"was made from. {ORIGINAL}."
        )
    if len(spec.shape) != 2 or spec.shape[1] * 2 % GROUP or not spec.is_plain:
        raise CheckpointError(
            f"{spec.name}: NVFP4 of shape {spec.shape}, expected a matrix of bytes with two elements each, in groups "
            f"of {GROUP}. {ORIGINAL}."
        )
    shape = (spec.shape[0], spec.shape[1] * 2)
    local_shape = (shape[0], shape[1] // GROUP)
    local = part(stored, spec.name, spec.name + LOCAL, "scale", ("float8_e4m3fn",), local_shape)
    general = part(stored, spec.name, spec.name + GENERAL, "general scale", ("float32",), (), (1,))
    scale = replace(local, dtype="float32", encoding=TwoLevel(local, general, divided=False))
    codes = replace(spec, dtype="float32", shape=shape, encoding=Nibbles(spec, "e2m1, one zero"))
    return replace(
        codes,
        encoding=BlockScaled(codes, scale, (1, GROUP), scheme="NVFP4"),
        written_as=stored.written_as("float32"),
    )
