"""Recognise quantised weights, and show them as the tensors they stand for, with the scales hidden.

Read are MLX's packed integers (``affine``: ``X.weight`` in uint32, ``X.scales``, ``X.biases``, bits and group in
``config.json``), and the FP8 schemes:

* block FP8 (DeepSeek-V3, Qwen): ``X.weight`` with ``X.weight_scale_inv``, one scale for each block of
  ``weight_block_size`` in ``config.json``, with ragged blocks at the edges. compressed-tensors writes the same as
  ``X.weight_scale`` and ``block_structure``.
* one scale a tensor, a row or a column (compressed-tensors ``float-quantized``, fbgemm, static FP8, ModelOpt FP8).

Stacked experts (experts, rows, columns) are matrices one after another. Every other scheme is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.affine_weights import affine_weights
from mergekit_lite.checkpoint.encodings import refused
from mergekit_lite.checkpoint.encodings.block_scaled import BlockScaled, grid
from mergekit_lite.checkpoint.tensor import Block, TensorSpec
from mergekit_lite.errors import CheckpointError, refuse

CODES = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")  # each is exact in float32
ENDINGS = ("_scale_inv", "_scale")
OF_ACTIVATIONS = (".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale")
OF_CACHE = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")


def dequantised(
    path: Path, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Show the quantised ones of all tensors that a checkpoint's files hold as what they stand for.

    Return the tensors, with dequantised weights as float32 and without their scales; and why each scale is left out.

    Raises:
        CheckpointError: some tensors are in a scheme that is refused, or a scale doesn't fit its weight. All are named.
    """
    quantization = _quantization(config)
    method = str(quantization["quant_method"]).lower() if quantization.get("quant_method") else None
    problems = refused.refusals(tensors, method)
    if not problems:
        logical, hidden, problems = _paired(tensors, _blocks(quantization))
        packed, of_packed, wrong = affine_weights(logical, config or {})
        logical = {name: packed.get(name, spec) for name, spec in logical.items() if name not in of_packed}
        hidden, problems = hidden | of_packed, [*problems, *wrong]
        problems += [] if problems else refused.unclaimed(logical)
    refuse(path, problems, "quantised weights")
    return logical, hidden


def _paired(
    tensors: Mapping[str, TensorSpec], blocks: frozenset[Block]
) -> tuple[dict[str, TensorSpec], dict[str, str], list[str]]:
    """Return the tensors to show by name, why each hidden one is left out, and what is wrong."""
    scaled: dict[str, TensorSpec] = {}
    hidden: dict[str, str] = {}
    problems: list[str] = []
    for name, spec in tensors.items():
        if spec.dtype in CODES:
            try:
                scale = _scale_of(spec, tensors)
                encoding = BlockScaled(spec, scale, _block_of(spec, scale, blocks))
                scaled[name] = replace(spec, dtype="float32", encoding=encoding, written_as="bfloat16")
            except CheckpointError as error:
                problems.append(str(error))
            else:
                hidden[scale.name] = f"scale of {name}, applied when that is read"
    for name, spec in tensors.items():
        if name in scaled or name in hidden or spec.dtype in CODES:
            continue
        runtime = name.endswith(OF_ACTIVATIONS) or (name.endswith(OF_CACHE) and spec.numel == 1)
        if scaled and runtime:
            hidden[name] = "scale of activations or of the cache, which unquantised weights don't use"
        elif problem := _stray(spec, tensors):
            problems.append(problem)
    logical = {name: scaled.get(name, spec) for name, spec in tensors.items() if name not in hidden}
    return logical, hidden, problems


def _scale_of(spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
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
    if spec.name + "_zero_point" in tensors:
        raise CheckpointError(f"{spec.name}: has a zero point, which no supported scheme uses. {refused.ORIGINAL}.")
    if scales[0].dtype not in SCALES:
        expected = ", ".join(SCALES)
        raise CheckpointError(
            f"{scales[0].name}: a scale should be one of {expected}, but is {scales[0].dtype}. {refused.ORIGINAL}."
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


def _stray(spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
    """Return what is wrong with a tensor that is a scale by its name or dtype, but of no codes; else None."""
    for ending in ("_scale_inv", ".weight_scale"):
        if spec.name.endswith(ending):
            weight = tensors.get(spec.name.removesuffix("_inv").removesuffix("_scale"))
            if weight is None:
                return f"{spec.name}: is the scale of a weight that isn't here. Name the whole folder, or remove it."
            return (
                f"{spec.name}: is a scale, but {weight.name} is plain {weight.dtype}; it is not clear whether it is "
                f"applied already. Remove the scale if it is; else {refused.ORIGINAL.lower()}."
            )
    if spec.dtype == "float8_e8m0fnu":
        return f"{spec.name}: holds scales (float8_e8m0fnu) of an unknown scheme. {refused.ORIGINAL}."
    return None


def _quantization(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the quantisation section of a config, or of its text model's config; empty where it has none."""
    config = config or {}
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    known = [section.get(key) for section in sections for key in ("quantization_config", "compression_config")]
    return next((section for section in known if isinstance(section, Mapping)), {})


def _blocks(quantization: Mapping[str, Any]) -> frozenset[Block]:
    sizes = [quantization.get("weight_block_size")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("strategy") == "block":
            sizes.append(weights.get("block_structure"))
    return frozenset(
        (size[0], size[1])
        for size in sizes
        if isinstance(size, list) and len(size) == 2 and all(type(edge) is int and edge > 0 for edge in size)
    )
