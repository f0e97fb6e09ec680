"""Recognise experts in MXFP4 as gpt-oss is published: ``X_blocks`` and ``X_scales`` for X of transformers' two names.

What they stand for has transformers' orientation, (experts, inputs, outputs), which is that of an unquantised
gpt-oss; for other names it would be a guess, and they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from mergekit_lite.checkpoint.encodings.mxfp4 import SIZE, TransposedMXFP4
from mergekit_lite.checkpoint.schemes.scheme import ORIGINAL, Quantised, Stored, part, quantised
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError

BLOCKS, SCALES = "_blocks", "_scales"
TRANSPOSED = ("gate_up_proj", "down_proj")


def recognise(stored: Stored) -> Iterator[Quantised]:
    """Yield the experts' matrices."""
    for name, spec in stored.tensors.items():
        if spec.dtype == "uint8" and name.endswith(BLOCKS):
            scales = name.removesuffix(BLOCKS) + SCALES
            parts = {scales: "scales"} if scales in stored.tensors else {}
            yield quantised(name, parts, partial(_shown, spec, stored))


def _shown(spec: TensorSpec, stored: Stored) -> TensorSpec:
    name = spec.name.removesuffix(BLOCKS)
    if not name.endswith(TRANSPOSED):
        known = " or ".join(TRANSPOSED)
        raise CheckpointError(
            f"{spec.name}: MXFP4 of a tensor other than {known}: it isn't known which way it lies. {ORIGINAL}, or load "
            "it with transformers and Mxfp4Config(dequantize=True), and save it."
        )
    if len(spec.shape) != 4 or spec.shape[-1] != SIZE // 2 or not spec.is_plain:
        raise CheckpointError(
            f"{spec.name}: MXFP4 blocks of shape {spec.shape}, expected (experts, rows, groups, {SIZE // 2}). "
            f"{ORIGINAL}."
        )
    exponents = part(stored, spec.name, name + SCALES, "scales", ("uint8",), spec.shape[:-1])
    experts, columns, groups, _ = spec.shape
    return replace(
        spec,
        name=name,
        dtype="bfloat16",
        shape=(experts, groups * SIZE, columns),
        encoding=TransposedMXFP4(spec, exponents),
        written_as=stored.written_as("bfloat16"),
    )
