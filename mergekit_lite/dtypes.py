"""The one table of tensor element types.

A dtype is named as in torch without its prefix ("bfloat16"). The table also gives the code that the safetensors
format uses and the size of an element in bytes. torch itself is imported only when a tensor is made: planning needs
names and sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mergekit_lite import block_fp8
from mergekit_lite.deferred import torch
from mergekit_lite.errors import UsageError, nearest


class DType(NamedTuple):
    """One element type: its torch name, its safetensors code, and its size in bytes."""

    name: str
    code: str
    size: int
    kind: str  # "float": arithmetic allowed; "scaled": means nothing without its scale; "exact": copied only


TABLE = (
    DType("float64", "F64", 8, "float"),
    DType("float32", "F32", 4, "float"),
    DType("bfloat16", "BF16", 2, "float"),
    DType("float16", "F16", 2, "float"),
    DType("float8_e4m3fn", "F8_E4M3", 1, "scaled"),
    DType("float8_e5m2", "F8_E5M2", 1, "scaled"),
    DType("float8_e8m0fnu", "F8_E8M0", 1, "scaled"),
    DType("complex64", "C64", 8, "exact"),
    DType("int64", "I64", 8, "exact"),
    DType("int32", "I32", 4, "exact"),
    DType("int16", "I16", 2, "exact"),
    DType("int8", "I8", 1, "exact"),
    DType("uint64", "U64", 8, "exact"),
    DType("uint32", "U32", 4, "exact"),
    DType("uint16", "U16", 2, "exact"),
    DType("uint8", "U8", 1, "exact"),
    DType("bool", "BOOL", 1, "exact"),
)
BY_NAME = {dtype.name: dtype for dtype in TABLE}
BY_CODE = {dtype.code: dtype for dtype in TABLE}
FLOATS = tuple(dtype.name for dtype in TABLE if dtype.kind == "float")
OUTPUTS = (*FLOATS, block_fp8.NAME)


def size(name: str) -> int:
    """Return the bytes of one element."""
    return BY_NAME[name].size


def is_float(name: str) -> bool:
    """Return whether merge arithmetic is allowed on this dtype as it stands."""
    return BY_NAME[name].kind == "float"


def float_named(text: str) -> str:
    """Return the float dtype a user means by ``bf16``, ``torch.bfloat16``, ``float32`` … Raises UsageError."""
    short = {
        "bf16": "bfloat16",
        "fp16": "float16",
        "half": "float16",
        "fp32": "float32",
        "float": "float32",
        "fp64": "float64",
    }
    name = text.removeprefix("torch.").lower()
    name = short.get(name, name)
    if name not in FLOATS:
        raise UsageError(f"Unknown output dtype {text!r}: expected one of {', '.join(FLOATS)}.{nearest(name, FLOATS)}")
    return name


def output_named(text: str) -> str:
    """Return the output dtype a user means: ``fp8``, or what ``float_named`` returns. Raises UsageError."""
    if text.lower() == block_fp8.NAME:
        return block_fp8.NAME
    try:
        return float_named(text)
    except UsageError:
        known = ", ".join(OUTPUTS)
        raise UsageError(f"Unknown output dtype {text!r}: expected one of {known}.{nearest(text, OUTPUTS)}") from None


def promoted(names: Iterable[str]) -> str:
    """Return the float dtype that holds what all of these hold: their own where they agree, else a wider one."""
    kinds = set(names)
    if len(kinds) == 1:
        return kinds.pop()
    return "float64" if "float64" in kinds else "float32"


def working(names: Iterable[str]) -> torch.dtype:
    """Return the dtype to compute in: float32 where all that goes in and comes out has 16 bits, else float64.

    With it the rounding to the output dtype is the only one that shows.
    """
    return torch.float32 if max(map(size, names)) <= 2 else torch.float64


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of this name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """Return the name in this table of a torch dtype; its plain torch name when the table lacks it."""
    return str(dtype).removeprefix("torch.")
