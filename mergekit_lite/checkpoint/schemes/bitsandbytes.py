"""Recognise weights that bitsandbytes quantised: NF4 and FP4, and the rows of whole numbers of LLM.int8.

A 4-bit ``X.weight`` has ``X.weight.absmax``, ``X.weight.quant_map`` and ``X.weight.quant_state.bitsandbytes__nf4``,
JSON with shape, dtype and blocks; where the magnitudes are quantised too, ``nested_absmax`` and ``nested_quant_map``.
An int8 one has ``X.SCB``. What is read is what ``dequantize_4bit`` gives, in the dtype that was quantised, and what
``int8_vectorwise_dequant`` gives, in float32.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.blockwise import Blockwise
from mergekit_lite.checkpoint.encodings.lookup import TABLES, Lookup, Nibbles
from mergekit_lite.checkpoint.encodings.vectorwise import Vectorwise
from mergekit_lite.checkpoint.schemes.scheme import ORIGINAL, Quantised, Stored, part, quantised
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError

METHOD = "bitsandbytes"
ABSMAX, MAP, STATE = ".absmax", ".quant_map", ".quant_state.bitsandbytes__"
NESTED_ABSMAX, NESTED_MAP = ".nested_absmax", ".nested_quant_map"
WEIGHT, SCB, FORMAT = "weight", "SCB", "weight_format"
KINDS = ("nf4", "fp4")
DTYPES = ("bfloat16", "float16", "float32")
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_STATE = 1 << 16  # bytes of JSON
ROW_FORMAT = 0
# Models of which bitsandbytes stores layers the other way round (transformers' Conv1D).
TRANSPOSED = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")


def recognise(stored: Stored) -> Iterator[Quantised]:
    """Yield the 4-bit and the int8 weights."""
    of_method = stored.method == METHOD
    for name, spec in stored.tensors.items():
        four_bits = {
            name + ending: "scale" if "absmax" in ending else "table"
            for ending in (ABSMAX, MAP, NESTED_ABSMAX, NESTED_MAP, *(STATE + kind for kind in KINDS))
            if name + ending in stored.tensors
        }
        layer = name.removesuffix(WEIGHT)
        bytes_alone = of_method and layer != name and spec.dtype in ("uint8", "int8")
        if four_bits or (bytes_alone and spec.dtype == "uint8"):
            yield quantised(name, four_bits, partial(_of_four_bits, spec, stored))
        elif spec.dtype == "int8" and layer != name and (bytes_alone or layer + SCB in stored.tensors):
            parts = {layer + SCB: "scale", layer + FORMAT: "format"}
            parts = {part: what for part, what in parts.items() if part in stored.tensors}
            yield quantised(name, parts, partial(_of_int8, spec, stored))


def _of_four_bits(spec: TensorSpec, stored: Stored) -> TensorSpec:
    name = spec.name
    kind, state = _state(stored, name)
    shape, size = tuple(state["shape"]), state["blocksize"]
    numel = math.prod(shape)
    if spec.numel * dtypes.size(spec.dtype) != -(-numel // 2) or not spec.is_plain:
        raise CheckpointError(
            f"{name}: {kind.upper()} of shape {shape} takes {-(-numel // 2):,} bytes, but it is {spec.dtype} of shape "
            f"{spec.shape}. {ORIGINAL}."
        )
    _check_transposed(stored, name)
    table = stored.content(part(stored, name, name + MAP, "table", ("float32",), (16,)))
    if struct.unpack("<16f", table) != TABLES[kind]:
        raise CheckpointError(f"{name}: its table {name}{MAP} isn't that of {kind.upper()}. {ORIGINAL}.")
    blocks = (-(-numel // size),)
    if "nested_blocksize" in state:
        absmax = _nested_absmax(stored, name, state, blocks)
    else:
        absmax = part(stored, name, name + ABSMAX, "scale", ("float32",), blocks)
    values = replace(spec, dtype="float32", shape=shape, encoding=Nibbles(spec, kind, first_is_high=True))
    return replace(
        values,
        dtype=state["dtype"],
        encoding=Blockwise(values, absmax, size, scheme=kind.upper()),
        written_as=stored.written_as(state["dtype"]),
    )


def _nested_absmax(stored: Stored, name: str, state: Mapping[str, Any], blocks: tuple[int, ...]) -> TensorSpec:
    """Return the magnitudes of a 4-bit weight, which are bytes with a table and magnitudes of their own."""
    codes = part(stored, name, name + ABSMAX, "scale", ("uint8",), blocks)
    table = part(stored, name, name + NESTED_MAP, "table of scales", ("float32",), (256,))
    size = state["nested_blocksize"]
    outer = part(stored, name, name + NESTED_ABSMAX, "scale of scales", ("float32",), (-(-blocks[0] // size),))
    values = replace(codes, dtype="float32", encoding=Lookup(codes, table))
    return replace(values, encoding=Blockwise(values, outer, size, mean=state["nested_offset"]))


def _state(stored: Stored, name: str) -> tuple[str, dict[str, Any]]:
    """Return the kind of a 4-bit weight and what its JSON says. Raises CheckpointError where that isn't clear."""
    kinds = [kind for kind in KINDS if name + STATE + kind in stored.tensors]
    if len(kinds) != 1:
        raise CheckpointError(
            f"{name}: 4-bit codes of bitsandbytes with {len(kinds)} descriptions (expected one of "
            f"{' or '.join(name + STATE + kind for kind in KINDS)}). If it is in another file, name the folder."
        )
    description = part(stored, name, name + STATE + kinds[0], "description", ("uint8",))
    try:
        state = json.loads(stored.content(description)) if description.numel <= MAX_STATE else None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or not _is_sound(state, kinds[0]):
        raise CheckpointError(
            f"{name}: {description.name} isn't the description that bitsandbytes writes (shape, dtype, blocksize, and "
            f"those of nested scales). {ORIGINAL}."
        )
    return kinds[0], state


def _is_sound(state: Mapping[str, Any], kind: str) -> bool:
    shape, offset = state.get("shape"), state.get("nested_offset", 0.0)
    nested = [key for key in state if key.startswith("nested_")]
    return (
        state.get("quant_type") == kind
        and state.get("dtype") in DTYPES
        and type(state.get("blocksize")) is int
        and state["blocksize"] in SIZES
        and isinstance(shape, list)
        and all(type(edge) is int and 0 <= edge < 1 << 40 for edge in shape)
        and (not nested or (type(state.get("nested_blocksize")) is int and state["nested_blocksize"] > 0))
        and state.get("nested_dtype", "float32") == "float32"
        and isinstance(offset, float)
        and math.isfinite(offset)
    )


def _of_int8(spec: TensorSpec, stored: Stored) -> TensorSpec:
    layer = spec.name.removesuffix(WEIGHT)
    if len(spec.shape) != 2:
        raise CheckpointError(f"{spec.name}: int8 of shape {spec.shape}, expected a matrix. {ORIGINAL}.")
    absmax = part(stored, spec.name, layer + SCB, "scale", ("float32",), spec.shape[:1])
    if layer + FORMAT in stored.tensors:
        layout = stored.content(part(stored, spec.name, layer + FORMAT, "format", ("uint8",), (), (1,)))[0]
        if layout != ROW_FORMAT:
            raise CheckpointError(
                f"{spec.name}: lies in the order of some GPU ({layer}{FORMAT} is {layout}, expected {ROW_FORMAT}, by "
                f"rows), which bitsandbytes no longer reads. {ORIGINAL}."
            )
    _check_transposed(stored, spec.name)
    return replace(
        spec,
        dtype="float32",
        encoding=Vectorwise(spec, absmax, scheme="LLM.int8"),
        written_as=stored.written_as("float32"),
    )


def _check_transposed(stored: Stored, name: str) -> None:
    """Raise CheckpointError for models whose layers lie one way in bitsandbytes' files and another in all others."""
    kind = stored.config.get("model_type")
    if kind in TRANSPOSED:
        raise CheckpointError(
            f"{name}: bitsandbytes stores layers of {kind} transposed, so it doesn't fit other models of that kind. "
            f"{ORIGINAL}."
        )
