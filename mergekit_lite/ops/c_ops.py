"""Compiled merges of 16-bit floats on the CPU: what dozens of torch calls do, in one pass over the bytes.

The methods are torch expressions, and what those say is what is computed, whether a kernel does it or not: merged
elements are the same bit for bit, sums over many elements agree to their last bits. A kernel is used where ``serve`` or
``take`` says so: on bfloat16 and float16 on the CPU, mixed as they come, and where the package was installed with a C
compiler at hand. For other dtypes, on a GPU, and for methods without a kernel torch runs.

Kernels take runs of elements in memory, be they a tensor's or a buffer's: merging bytes needs no torch at all. In every
function a block's base is its first run, where there is one, and the models are the others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from ctypes import c_char, c_double, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.deferred import np, torch
from mergekit_lite.dtypes import name_of

if TYPE_CHECKING:
    import numpy.typing as npt

DTYPES = ("bfloat16", "float16")
SIZE = 2  # bytes of an element
MOST_TENSORS = 66  # their tiles are on the stack
EVERYTHING, BY_SIZE, BY_CHANCE, BY_RANK = range(4)


class Run(ctypes.Structure):
    """Elements one behind the other in memory, which has to last as long as the run.

    Attributes:
        words: the address.
        count: of the elements.
        half: whether they are float16.
    """

    _fields_ = (("words", c_void_p), ("count", c_size_t), ("half", c_int64))

    def part(self, elements: slice) -> Run:
        """Some of the elements."""
        return Run(self.words + elements.start * SIZE, elements.stop - elements.start, self.half)


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


RUN, FLOATS, DOUBLES = ctypes.POINTER(Run), ctypes.POINTER(c_float), ctypes.POINTER(c_double)
BLOCK = (RUN, RUN, c_size_t)  # base, models, how many
PLACE = (ctypes.POINTER(Keep), c_size_t, c_size_t)  # what is kept, length of a row, start
SIGNATURES = {
    "merge_sum": (None, RUN, *BLOCK, FLOATS, c_float, *PLACE),
    "merge_elected": (None, RUN, *BLOCK, FLOATS, FLOATS, FLOATS, c_float, *PLACE),
    "lengths": (None, DOUBLES, *BLOCK, *PLACE),
    "inner_products": (None, DOUBLES, *BLOCK),
    "compare_sizes": (None, c_void_p, RUN, RUN, c_float, c_size_t, c_size_t),
    "count_upper_bits": (None, c_void_p, RUN, RUN),
    "count_lower_bits": (None, c_void_p, c_size_t, RUN, RUN, c_int),
    "all_finite": (c_int, RUN),
}


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """The compiled functions; None where the package was installed without them."""
    library = Path(__file__).with_name("_compiled.so")  # so named on every platform, see setup.py
    if not library.exists():
        return None
    loaded = ctypes.CDLL(str(library))
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def serve(dtypes: Collection[str]) -> bool:
    """Whether the kernels can be used on tensors of these dtypes, one for each, in the memory of the CPU."""
    return compiled() is not None and len(dtypes) <= MOST_TENSORS and all(dtype in DTYPES for dtype in dtypes)


def take(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can be used on these tensors."""
    return serve([name_of(tensor.dtype) for tensor in tensors]) and all(
        tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors
    )


def run(data: memoryview, dtype: str) -> Run:
    """The elements that some bytes are; at least one."""
    return Run(ctypes.addressof(c_char.from_buffer(data)), len(data) // SIZE, dtype == "float16")


def run_of(tensor: torch.Tensor) -> Run:
    """The elements of a tensor."""
    return Run(tensor.data_ptr(), tensor.numel(), tensor.dtype == torch.float16)


def merge_sum(
    out: Run,
    block: Sequence[Run],
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
    _call("merge_sum", out, *_parted(block, has_base), *numbers, _keeps(keeps), row, start)


def merge_elected(
    out: Run,
    block: Sequence[Run],
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
    _call("merge_elected", out, *_parted(block, True), *numbers, _keeps(keeps), row, start)


def lengths(block: Sequence[Run], keeps: Sequence[Keep], start: int, row: int = 0) -> list[float]:
    """Σ|δ| of each model, then of what is kept of each."""
    sums = (c_double * (2 * len(keeps)))()
    _call("lengths", sums, *_parted(block, True), _keeps(keeps), row, start)
    return list(sums)


def inner_products(block: Sequence[Run], has_base: bool) -> list[float]:
    """The lower triangle, row by row, of the inner products of the deltas, or without a base of the models."""
    n = len(block) - has_base
    products = (c_double * (n * (n + 1) // 2))()
    _call("inner_products", products, *_parted(block, has_base))
    return list(products)


def count_upper_bits(bins: int, base: Run, model: Run) -> npt.NDArray[np.int64]:
    """How many sizes of deltas there are by the upper 16 bits of the float32, zero by itself: in so many bins."""
    counts = np.zeros(bins, np.int64)
    _call("count_upper_bits", counts.ctypes.data, base, model)
    return counts


def count_lower_bits(bins: int, base: Run, model: Run, first: int) -> npt.NDArray[np.int64]:
    """How many sizes of deltas have each of so many bit patterns from ``first`` on."""
    counts = np.zeros(bins, np.int64)
    _call("count_lower_bits", counts.ctypes.data, bins, base, model, first)
    return counts


def compare_sizes(
    counts: npt.NDArray[np.int64], base: Run, model: Run, threshold: float, start: int, step: int
) -> None:
    """Count the sizes of deltas, adding to ``counts``: above zero, above a threshold, and equal to it by index.

    Args:
        counts: int64, contiguous: the two numbers, then one for each ``step`` indices.
        base, model: as many elements.
        threshold: a float32.
        start: index of the first element.
        step: indices counted together.
    """
    _call("compare_sizes", counts.ctypes.data, base, model, threshold, start, step)


def all_finite(run: Run) -> bool:
    """Whether a run holds neither NaN nor infinity."""
    return bool(_call("all_finite", run))


def _parted(block: Sequence[Run], has_base: bool) -> tuple[Run | None, object, int]:
    models = block[has_base:]
    return block[0] if has_base else None, (Run * len(models))(*models), len(models)


def _floats(numbers: Sequence[float]) -> object:
    return (c_float * len(numbers))(*numbers)


def _keeps(keeps: Sequence[Keep]) -> object:
    return (Keep * len(keeps))(*keeps)


def _call(name: str, *arguments: object) -> object:
    return getattr(compiled(), name)(*arguments)
