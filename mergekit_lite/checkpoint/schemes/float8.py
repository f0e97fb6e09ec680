"""Recognise FP8: codes of a weight's shape, and scales beside them.

* block FP8 (DeepSeek-V3, Qwen): ``X.weight`` with ``X.weight_scale_inv``, one scale for each block of
  ``weight_block_size`` in ``config.json``, with ragged blocks at the edges. compressed-tensors writes the same as
  ``X.weight_scale`` and ``block_structure``.
* one scale a tensor, a row, a column, or a group of a row (compressed-tensors ``float-quantized`` and
  ``mxfp8-quantized``, fbgemm, static FP8, ModelOpt FP8).

Stacked experts (experts, rows, columns) are matrices one after another. The values are float32 and exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mergekit_lite.checkpoint.encodings.block_scaled import BlockScaled, grid
from mergekit_lite.checkpoint.schemes.scheme import ORIGINAL, Quantised, Stored, quantised
from mergekit_lite.checkpoint.tensor import Block, TensorSpec
from mergekit_lite.errors import CheckpointError

CODES = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")  # each is exact in float32
ENDINGS = ("_scale_inv", "_scale")
ZERO_POINT = "_zero_point"
MXFP8 = "mxfp8-quantized"  # its scales are exponents in bytes


def recognise(stored: Stored) -> Iterator[Quantised]:
    """Yield the weights of float8 codes."""
    blocks = _blocks(stored.quantization)
    for name, spec in stored.tensors.items():
        if spec.dtype in CODES:
            endings = (*ENDINGS, ZERO_POINT)
            parts = {name + ending: "scale" for ending in endings if name + ending in stored.tensors}
            yield quantised(name, parts, partial(_shown, spec, stored, blocks))


def _shown(spec: TensorSpec, stored: Stored, blocks: frozenset[Block]) -> TensorSpec:
    scale = _scale_of(spec, stored)
    encoding = BlockScaled(spec, scale, _block_of(spec, scale, blocks), scheme="FP8")
    return replace(spec, dtype="float32", encoding=encoding, written_as=stored.written_as("float32"))


def _scale_of(spec: TensorSpec, stored: Stored) -> TensorSpec:
    tensors = stored.tensors
    scales = [tensors[spec.name + ending] for ending in ENDINGS if spec.name + ending in tensors]
    if not scales:
        raise CheckpointError(
            f"{spec.name}: {spec.dtype} codes without a scale (looked for {spec.name}_scale_inv and _scale). If the "
            "scale is in another file, name the folder; if these are plain values, save them as bfloat16 first."
        )
    if len(scales) > 1:
        raise CheckpointError(
            f"{spec.name}: has both {scales[0].name} and {scales[1].name}; it is not clear which is meant."
        )
    if spec.name + ZERO_POINT in tensors:
        raise CheckpointError(f"{spec.name}: has a zero point, which no supported scheme uses. {ORIGINAL}.")
    if scales[0].dtype == "uint8" and stored.quantization.get("format") == MXFP8:
        return replace(scales[0], dtype="float8_e8m0fnu")
    if scales[0].dtype not in SCALES:
        expected = ", ".join(SCALES)
        raise CheckpointError(
            f"{scales[0].name}: a scale should be one of {expected}, but is {scales[0].dtype}. {ORIGINAL}."
        )
    return scales[0]


def _block_of(spec: TensorSpec, scale: TensorSpec, blocks: frozenset[Block]) -> Block:
    """Return the (rows, columns) that share a scale, by the shapes; a true block's size comes from the config alone."""
    *stack, rows, columns = (1, 1, *spec.shape)[-max(2, len(spec.shape)) :]
    matrix = max(1, rows), max(1, columns)
    if scale.numel == 1:
        return matrix
    a_row, a_column = (1, matrix[1]), (matrix[0], 1)
    schemes = [((*stack, *grid(matrix, block)), block) for block in (*blocks, a_row, a_column, matrix)]
    schemes += [((*stack, rows), a_row), (tuple(stack), matrix)]
    fitting = {(min(block[0], matrix[0]), min(block[1], matrix[1])) for shape, block in schemes if shape == scale.shape}
    if len(fitting) != 1 or len(spec.shape) < 2:
        known = " or ".join(f"{height} × {width}" for height, width in sorted(blocks)) or "none given"
        raise CheckpointError(
            f"{spec.name}: its scale {scale.name} has shape {scale.shape}, which doesn't fit a weight of {spec.shape}: "
            f"expected one scale a tensor, a row, or a block (block size in config.json: {known})."
        )
    return fitting.pop()


def _blocks(quantization: Mapping[str, Any]) -> frozenset[Block]:
    """Return the sizes of blocks that the config names."""
    sizes = [quantization.get("weight_block_size")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("strategy") == "block":
            sizes.append(weights.get("block_structure"))
        elif isinstance(weights, Mapping) and weights.get("strategy") in ("group", "tensor_group"):
            sizes.append([1, weights.get("group_size")])
    return frozenset(
        (size[0], size[1])
        for size in sizes
        if isinstance(size, list) and len(size) == 2 and all(type(edge) is int and edge > 0 for edge in size)
    )
