"""Compiled merges of bfloat16 blocks on the CPU: what dozens of torch calls do, in one pass over the bytes.

The methods are torch expressions, and what those say is what is computed, whether a kernel does it or not: merged
elements are the same bit for bit, sums over many elements agree to their last bits. A kernel is used where ``serve`` or
``take`` says so: on bfloat16 on the CPU, and where the package was installed with a C compiler at hand. For other
dtypes, on a GPU, and for methods without a kernel torch runs.

A block's tensors are torch's, or the bytes of their elements: merging bytes needs no torch at all. In every function a
block's base is its first one, where there is one, and the models are the others.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Collection, Sequence
from ctypes import c_char, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import lru_cache
from typing import TypeAlias

from mergekit_lite.deferred import torch
from mergekit_lite.dtypes import name_of

Stored: TypeAlias = "torch.Tensor | memoryview"  # of bfloat16, contiguous

SIZE = 2  # bytes of an element
MOST_MODELS = 64  # their tiles are on the stack
EVERYTHING, BY_SIZE, BY_CHANCE, BY_RANK = range(4)


class Keep(ctypes.Structure):
    """Which elements of a delta are kept.

    Attributes:
        how: ``EVERYTHING``, ``BY_SIZE``, ``BY_CHANCE`` or ``BY_RANK``.
        low, low_end: by size: what is above ``low``, or equal to it at an index before ``low_end``,
        high, high_end: but not what is above ``high``, or equal to it at an index before ``high_end``.
        key, limit: by chance: where the element's 16-bit draw with this key is below the limit.
        lowest, half_step, divide: by rank: with the probability lowest + half_step · twice the rank of its size in its
            row, and divided by it where set.
    """

    _fields_ = (
        *(("how", c_int64), ("low_end", c_int64), ("high_end", c_int64), ("divide", c_int64), ("key", c_uint64)),
        *((name, c_float) for name in ("low", "high", "limit", "lowest", "half_step")),
    )


TENSOR, TENSORS, FLOATS = c_void_p, ctypes.POINTER(c_void_p), ctypes.POINTER(c_float)
BLOCK = (TENSOR, TENSORS, c_size_t)  # base, models, how many
PLACE = (ctypes.POINTER(Keep), c_size_t, c_size_t, c_size_t)  # what is kept, length of a row, start, elements
SIGNATURES = {
    "merge_sum": (None, TENSOR, *BLOCK, FLOATS, c_float, *PLACE),
    "merge_elected": (None, TENSOR, *BLOCK, FLOATS, FLOATS, FLOATS, c_float, *PLACE),
    "lengths": (None, TENSOR, *BLOCK, *PLACE),
    "inner_products": (None, TENSOR, *BLOCK, c_size_t),
    "compare_sizes": (None, TENSOR, TENSOR, TENSOR, c_float, c_size_t, c_size_t, c_size_t),
    "all_finite": (c_int, TENSOR, c_size_t),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where the package was installed without them."""
    compiled = importlib.util.find_spec("mergekit_lite.kernels._compiled")
    if compiled is None or compiled.origin is None:
        return None
    loaded = ctypes.CDLL(compiled.origin)
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def serve(dtypes: Collection[str]) -> bool:
    """Whether the kernels can be used on tensors of these dtypes, one for each, that lie in the memory of the CPU."""
    return library() is not None and len(dtypes) <= MOST_MODELS and all(dtype == "bfloat16" for dtype in dtypes)


def take(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can be used on these tensors."""
    return serve([name_of(tensor.dtype) for tensor in tensors]) and all(
        tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors
    )


def merge_sum(
    out: Stored,
    block: Sequence[Stored],
    has_base: bool,
    coefficients: Sequence[float],
    divisor: float,
    keeps: Sequence[Keep],
    start: int,
    row: int = 0,
) -> None:
    """(Σ coefficient·model) / divisor; with a base: base + (Σ coefficient·kept delta) / divisor.

    Args:
        out: gets the result.
        block: as many elements each.
        has_base: whether the first one is a base.
        coefficients, keeps: one for each model.
        divisor: 1 divides by nothing.
        start: index of the block's first element.
        row: where something is kept by rank, the length of the rows, which blocks don't split.
    """
    numbers = (_floats(coefficients), divisor)
    _call("merge_sum", _address(out), *_parted(block, has_base), *numbers, _keeps(keeps), row, start, _elements(out))


def merge_elected(
    out: Stored,
    block: Sequence[Stored],
    votes: Sequence[float],
    shares: Sequence[float],
    weights: Sequence[float] | None,
    scale: float,
    keeps: Sequence[Keep],
    start: int,
    row: int = 0,
) -> None:
    """Base plus those kept deltas that have the elected sign, into ``out``: ``methods.election`` has the formula."""
    numbers = (_floats(votes), _floats(shares), None if weights is None else _floats(weights), scale)
    _call("merge_elected", _address(out), *_parted(block, True), *numbers, _keeps(keeps), row, start, _elements(out))


def lengths(block: Sequence[torch.Tensor], keeps: Sequence[Keep], start: int, row: int = 0) -> torch.Tensor:
    """Σ|δ| of each model, and of what is kept of it: float64 (2, models)."""
    sums = torch.empty(2, len(block) - 1, dtype=torch.float64)
    _call("lengths", _address(sums), *_parted(block, True), _keeps(keeps), row, start, block[0].numel())
    return sums


def inner_products(block: Sequence[torch.Tensor], has_base: bool) -> torch.Tensor:
    """The lower triangle, row by row, of the inner products of the deltas, or without a base of the models: float64."""
    n = len(block) - has_base
    products = torch.empty(n * (n + 1) // 2, dtype=torch.float64)
    _call("inner_products", _address(products), *_parted(block, has_base), block[0].numel())
    return products


def compare_sizes(
    counts: torch.Tensor, base: torch.Tensor, model: torch.Tensor, threshold: float, start: int, step: int
) -> None:
    """Count the sizes of deltas, adding to ``counts``: above zero, above a threshold, and equal to it by index.

    Args:
        counts: int64, contiguous: the two numbers, then one for each ``step`` indices.
        base, model: of one shape.
        threshold: a float32.
        start: index of the first element.
        step: indices counted together.
    """
    _call("compare_sizes", _address(counts), _address(base), _address(model), threshold, start, step, model.numel())


def all_finite(tensor: Stored) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return bool(_call("all_finite", _address(tensor), _elements(tensor)))


def _elements(tensor: Stored) -> int:
    return tensor.nbytes // SIZE


def _address(tensor: Stored) -> int:
    return ctypes.addressof(c_char.from_buffer(tensor)) if isinstance(tensor, memoryview) else tensor.data_ptr()


def _parted(block: Sequence[Stored], has_base: bool) -> tuple[int | None, object, int]:
    models = block[has_base:]
    addresses = (c_void_p * len(models))(*map(_address, models))
    return _address(block[0]) if has_base else None, addresses, len(models)


def _floats(numbers: Sequence[float]) -> object:
    return (c_float * len(numbers))(*numbers)


def _keeps(keeps: Sequence[Keep]) -> object:
    return (Keep * len(keeps))(*keeps)


def _call(name: str, *arguments: object) -> object:
    return getattr(library(), name)(*arguments)
