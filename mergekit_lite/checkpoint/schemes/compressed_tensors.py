"""Recognise weights that compressed-tensors stored: whole numbers, packed or not, and 4-bit floats.

``X.weight`` in int8 (``int-quantized``), ``X.weight_packed`` in int32 (``pack-quantized``) or in bytes
(``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``), with ``X.weight_scale`` and, by scheme, ``X.weight_zero_point``,
``X.weight_shape``, ``X.weight_global_scale``. ``config_groups`` of the config says which layers have which bits, groups
and zero points. What is read is what its compressors' ``decompress`` gives, in the dtype that they give: that of the
scales, and bfloat16 for 4-bit floats. FP8 has a file of its own, as others store it alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.block_scaled import BlockScaled, grid
from mergekit_lite.checkpoint.encodings.lookup import Nibbles
from mergekit_lite.checkpoint.encodings.packed import PackedColumns, PackedRows
from mergekit_lite.checkpoint.encodings.two_level import TwoLevel
from mergekit_lite.checkpoint.patterns import pattern_problem
from mergekit_lite.checkpoint.schemes.scheme import ORIGINAL, Quantised, Stored, part, quantised
from mergekit_lite.checkpoint.tensor import Block, TensorSpec
from mergekit_lite.errors import CheckpointError

METHOD = "compressed-tensors"
WEIGHT, PACKED = ".weight", ".weight_packed"
SCALE, ZERO_POINT, GLOBAL_SCALE = "_scale", "_zero_point", "_global_scale"
SHAPE, ORDER = "_shape", "_g_idx"
PARTS = {
    SCALE: "scale", ZERO_POINT: "zero point", GLOBAL_SCALE: "general scale", SHAPE: "shape", ORDER: "order of columns",
}  # fmt: skip
PLAIN = ("int-quantized", "naive-quantized")
PACKED_NUMBERS, NVFP4, MXFP4 = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FLOAT_GROUPS = {NVFP4: 16, MXFP4: 32}  # elements of a row that share a scale
MIXED = "mixed-precision"  # each group of the config has a format of its own
WORD = 32  # bits
MAX_REPEATS = 3  # in a pattern of layers' names, such as .*experts.*(gate|up|down)_proj.*


class Weights(NamedTuple):
    """What a group of the config says about how weights are stored."""

    format: str
    type: str
    bits: int
    strategy: str
    symmetric: bool
    group_size: int | None = None
    block: Block | None = None


def recognise(stored: Stored) -> Iterator[Quantised]:
    """Yield the weights of packed codes, and those of int8 where the config says that they are this library's."""
    of_method = stored.method == METHOD
    for name, spec in stored.tensors.items():
        packed = name.endswith(PACKED)
        if not (packed or (of_method and spec.dtype == "int8" and name.endswith(WEIGHT))):
            continue
        weight = name.removesuffix("_packed")
        parts = {weight + ending: what for ending, what in PARTS.items() if weight + ending in stored.tensors}
        yield quantised(name, parts, partial(_shown, spec, weight, stored))


def _shown(spec: TensorSpec, weight: str, stored: Stored) -> TensorSpec:
    weights = _weights_of(weight.removesuffix(WEIGHT), spec, stored)
    if weight in stored.tensors and weight != spec.name:
        raise CheckpointError(f"{spec.name}: {weight} is stored too; it is not clear which is meant.")
    if len(spec.shape) != 2 or not spec.is_plain:
        raise CheckpointError(f"{spec.name}: {spec.dtype} of shape {spec.shape}, expected a matrix. {ORIGINAL}.")
    if weight + ORDER in stored.tensors:
        raise CheckpointError(
            f"{spec.name}: its columns are in an order of their own ({weight}{ORDER}, 'actorder': 'group'), which "
            f"compressed-tensors no longer reads either. {ORIGINAL}."
        )
    shown = (
        _of_floats(spec, weight, weights, stored)
        if weights.type == "float"
        else _of_integers(spec, weight, weights, stored)
    )
    return replace(shown, name=weight, written_as=stored.written_as(shown.dtype))


def _of_integers(spec: TensorSpec, weight: str, weights: Weights, stored: Stored) -> TensorSpec:
    shape = spec.shape if weights.format in PLAIN else _shape(spec, weight, weights.bits, stored)
    block, scale_shapes = _scales(spec.name, shape, weights)
    scale = part(stored, spec.name, weight + SCALE, "scale", dtypes.FLOATS, *scale_shapes)
    codes = (
        spec
        if weights.format in PLAIN
        else replace(spec, dtype="int8", shape=shape, encoding=PackedRows(spec, weights.bits))
    )
    zero_point = None
    if weight + ZERO_POINT in stored.tensors or not weights.symmetric:
        if weights.format == PACKED_NUMBERS and not weights.symmetric and weights.strategy in ("group", "channel"):
            rows, columns = scale.shape
            words = -(-rows * weights.bits // WORD), columns
            zero_point = part(stored, spec.name, weight + ZERO_POINT, "zero point", ("int32",), words)
            encoding = PackedColumns(zero_point, weights.bits)
            zero_point = replace(zero_point, dtype="int8", shape=scale.shape, encoding=encoding)
        else:
            zero_point = part(stored, spec.name, weight + ZERO_POINT, "zero point", ("int8",), scale.shape)
    scheme = f"INT{weights.bits}"
    return replace(codes, dtype=scale.dtype, encoding=BlockScaled(codes, scale, block, zero_point, scheme))


def _shape(spec: TensorSpec, weight: str, bits: int, stored: Stored) -> tuple[int, int]:
    """Return the shape that packed numbers have, which is stored with them."""
    of_shape = part(stored, spec.name, weight + SHAPE, "shape", ("int64", "int32"), (2,))
    content, size = stored.content(of_shape), dtypes.size(of_shape.dtype)
    rows, columns = (int.from_bytes(content[at : at + size], "little", signed=True) for at in (0, size))
    words = -(-columns * bits // WORD)
    if columns < 0 or spec.dtype != "int32" or spec.shape != (rows, words):
        raise CheckpointError(
            f"{spec.name}: is {spec.dtype} of shape {spec.shape}, but {bits} bits for each of {(rows, columns)} "
            f"elements ({weight}{SHAPE}) are int32 of shape {(rows, words)}. {ORIGINAL}."
        )
    return rows, columns


def _scales(name: str, shape: tuple[int, ...], weights: Weights) -> tuple[Block, tuple[tuple[int, ...], ...]]:
    """Return the rows and columns that share a scale, and the shapes that the scales may have."""
    rows, columns = shape
    matrix = max(1, rows), max(1, columns)
    if weights.strategy == "tensor":
        return matrix, ((1,), ())
    if weights.strategy == "channel":
        return (1, matrix[1]), ((rows, 1),)
    if weights.strategy in ("group", "tensor_group") and weights.group_size and columns % weights.group_size == 0:
        return (1, weights.group_size), ((rows, columns // weights.group_size),)
    if weights.strategy == "block" and weights.block:
        return weights.block, (grid(matrix, weights.block),)
    raise CheckpointError(
        f"{name}: scales by {weights.strategy!r} (group_size {weights.group_size}, block_structure {weights.block}) "
        f"don't fit a weight of {shape}. Is 'quantization_config' of config.json that of these weights?"
    )


def _of_floats(spec: TensorSpec, weight: str, weights: Weights, stored: Stored) -> TensorSpec:
    rows, columns = spec.shape[0], spec.shape[1] * 2
    group = FLOAT_GROUPS[weights.format]
    if spec.dtype != "uint8" or columns % group or weights.group_size != group:
        raise CheckpointError(
            f"{spec.name}: {spec.dtype} of shape {spec.shape} in groups of {weights.group_size}, expected bytes with "
            f"two elements each in groups of {group}. {ORIGINAL}."
        )
    shape, scale_shape = (rows, columns), (rows, columns // group)
    if weights.format == NVFP4:
        local = part(stored, spec.name, weight + SCALE, "scale", ("float8_e4m3fn",), scale_shape)
        general = part(stored, spec.name, weight + GLOBAL_SCALE, "general scale", ("float32",), (1,))
        scale = replace(local, dtype="float32", encoding=TwoLevel(local, general, divided=True))
    else:
        exponents = part(stored, spec.name, weight + SCALE, "scale", ("uint8", "float8_e8m0fnu"), scale_shape)
        scale = replace(exponents, dtype="float8_e8m0fnu")
    if weight + ZERO_POINT in stored.tensors:
        raise CheckpointError(f"{spec.name}: 4-bit floats with {weight}{ZERO_POINT}, which aren't read. {ORIGINAL}.")
    codes = replace(spec, dtype="bfloat16", shape=shape, encoding=Nibbles(spec, "e2m1"))
    return replace(codes, encoding=BlockScaled(codes, scale, (1, group), scheme=weights.format.split("-")[0].upper()))


def _weights_of(layer: str, spec: TensorSpec, stored: Stored) -> Weights:
    """Return how a layer is stored, by the group of the config that names it, or else by those for kinds of layers."""
    if stored.method != METHOD:
        raise CheckpointError(
            f"{spec.name}: packed codes of compressed-tensors, but 'quantization_config' of config.json isn't its own. "
            f"If the weights are in another folder than their config, put them together. {ORIGINAL} otherwise."
        )
    if stored.quantization.get("transform_config"):
        raise CheckpointError(
            f"{spec.name}: has transforms that are applied while the model runs ('transform_config'). {ORIGINAL}."
        )
    groups = stored.quantization.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    described = [(group, _weights(group, stored.quantization.get("format"), spec)) for group in groups]
    fitting = [(group, weights) for group, weights in described if weights is not None]
    if len({weights for _, weights in fitting}) > 1:
        named = [
            (group, weights) for group, weights in fitting if any(_names(target, layer) for target in _targets(group))
        ]
        by_kind = [each for each in fitting if any(target[:1].isupper() for target in _targets(each[0]))]  # "Linear"
        fitting = named or by_kind
    ways = {weights for _, weights in fitting}
    if len(ways) != 1:
        raise CheckpointError(
            f"{spec.name}: 'config_groups' of config.json describes such a weight ({spec.dtype}) in {len(ways)} ways, "
            f"expected one. {ORIGINAL}."
        )
    return ways.pop()


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []


def _names(target: str, layer: str) -> bool:
    """Return whether a target of the config is this layer: by name, or by a pattern that its name begins with."""
    if not target.startswith("re:"):
        return target == layer
    pattern = target.removeprefix("re:")
    return pattern_problem(pattern, MAX_REPEATS) is None and re.match(pattern, layer) is not None


def _weights(group: Mapping[str, Any], format: object, spec: TensorSpec) -> Weights | None:
    """Return what a group says of its weights, with the library's defaults; None where it can't be of this tensor."""
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        return None
    bits, kind = weights.get("num_bits", 8), weights.get("type") or "int"
    size = weights.get("group_size")
    group_size = size if type(size) is int and size > 0 else None
    packed, format = spec.name.endswith(PACKED), group.get("format") or format
    if kind == "float" and packed and bits == 4:
        dtype, formats = "uint8", tuple(FLOAT_GROUPS)
        implied = next((name for name, of_format in FLOAT_GROUPS.items() if of_format == group_size), None)
    elif kind == "int" and type(bits) is int and 1 <= bits <= 8:
        dtype, formats = ("int32", (PACKED_NUMBERS,)) if packed else ("int8", PLAIN)
        implied = formats[0]
    else:
        return None
    format = implied if format in (None, MIXED) else format
    if spec.dtype != dtype or not isinstance(format, str) or format not in formats:
        return None
    strategy = weights.get("strategy") or ("group" if group_size else "tensor" if size is None else "channel")
    symmetric, block = weights.get("symmetric") is not False, _block(weights.get("block_structure"))
    return Weights(format, kind, bits, str(strategy), symmetric, group_size, block)


def _block(size: object) -> Block | None:
    """Return the rows and columns of a block, as the config names them; None where it doesn't."""
    if isinstance(size, list) and len(size) == 2 and all(type(edge) is int and edge > 0 for edge in size):
        return size[0], size[1]
    return None
