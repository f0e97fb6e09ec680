"""Operations in C, on bfloat16 and float16 in the memory of the CPU: what dozens of torch calls do, in one pass.

Casts to them from float32 are there, too.

``torch_ops`` says what an operation computes, and the C functions give the same: merged elements bit for bit, sums over
many elements to their last bits. ``does`` says which operations they do, and to which tensors: 16-bit floats, mixed as
they come, where the package was installed with a C compiler at hand.

They take runs of elements in memory, be they a tensor's or a buffer's: merging bytes needs no torch at all. In every
function a block's base is its first run, where there is one, and the models are the others.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Collection, Sequence
from ctypes import c_char, c_double, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import lru_cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite import draws
from mergekit_lite.deferred import np, torch
from mergekit_lite.dtypes import name_of
from mergekit_lite.ops import operations as op
from mergekit_lite.ops.operations import DeltaSizes, Masks, Merge, Statistic, TensorKind

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

    def __getitem__(self, elements: slice) -> Run:
        """Return some of the elements; the slice's begin lies among them."""
        stop = min(elements.stop, self.count)
        return Run(self.words + elements.start * SIZE, stop - elements.start, self.half)


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
BLOCK_ARGUMENTS = (RUN, RUN, c_size_t)  # base, models, how many
PLACE = (ctypes.POINTER(Keep), c_size_t, c_size_t)  # what is kept, length of a row, start
SIGNATURES = {
    "cast": (None, RUN, c_void_p),
    "merge_sum": (None, RUN, *BLOCK_ARGUMENTS, FLOATS, c_float, *PLACE),
    "merge_elected": (None, RUN, *BLOCK_ARGUMENTS, FLOATS, FLOATS, FLOATS, c_float, *PLACE),
    "lengths": (None, DOUBLES, *BLOCK_ARGUMENTS, *PLACE),
    "inner_products": (None, DOUBLES, *BLOCK_ARGUMENTS),
    "compare_sizes": (None, c_void_p, RUN, RUN, c_float, c_size_t, c_size_t),
    "count_upper_bits": (None, c_void_p, RUN, RUN),
    "count_lower_bits": (None, c_void_p, c_size_t, RUN, RUN, c_int),
    "all_finite": (c_int, RUN),
}


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """Return the compiled functions; None where the package was installed without them, or for another machine.

    A library that lacks one of them was built from older sources: what else it has may differ, too, and none is used.
    """
    path = Path(__file__).with_name("_compiled.so")  # so named on every platform, see setup.py
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    if not all(hasattr(library, name) for name in SIGNATURES):
        return None
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class COps:
    """The backend, for every tensor it takes."""

    needs_torch = False

    def of_bytes(self, chunk: memoryview, dtype: str) -> Run:
        """Return the elements that some bytes are; at least one. Of float32 only where they begin is of use."""
        return Run(ctypes.addressof(c_char.from_buffer(chunk)), len(chunk) // SIZE, dtype == "float16")

    def of_tensor(self, tensor: torch.Tensor) -> Run:
        """Return the elements of a tensor, which has to last as long."""
        assert take(tensor), "the kernels read memory of the CPU, 16-bit elements one behind the other"
        return Run(tensor.data_ptr(), tensor.numel(), tensor.dtype == torch.float16)

    def merge(
        self,
        operation: Merge,
        block: Sequence[Run],
        start: int,
        out: Run,
        length: int,
        observed: op.Observed = op.NOTHING,
    ) -> list[list[float]]:
        """Merge a block at once: tile by tile it stays in the cache, so that ``length`` doesn't matter."""
        self._merge(operation, block, start, out)
        return [self.figures(observed.figures, [run[grain] for run in (out, *block)]) for grain in observed.grains]

    def at_hand(self, block: Sequence[Run]) -> Sequence[Run]:
        """Return the block as it is."""
        return block

    def _merge(self, operation: Merge, block: Sequence[Run], start: int, out: Run) -> None:
        if isinstance(operation, op.WeightedSum):
            block = [block[number] for number in operation.order] if operation.order else block
            keeps, row = _keeps_of(operation.masks, len(operation.coefficients))
            numbers: tuple[object, ...] = (_floats(operation.coefficients), operation.divisor)
            _call("merge_sum", out, *_parted(block, operation.from_base), *numbers, _keeps(keeps), row, start)
            return
        if isinstance(operation, op.Cast):
            _call("cast", out, block[0].words)
            return
        assert isinstance(operation, op.Election) and isinstance(operation.kept, tuple)
        keeps, row = _keeps_of(operation.kept, len(operation.votes))
        weights = None if operation.weights is None else _floats(operation.weights)
        numbers = (_floats(operation.votes), _floats(operation.shares), weights, operation.scale)
        _call("merge_elected", out, *_parted(block, True), *numbers, _keeps(keeps), row, start)

    def sum(self, operation: Statistic, block: Sequence[Run], start: int, length: int) -> npt.NDArray[Any]:
        """Return the figures over a block, added up over parts of ``length`` elements."""
        parts = (
            np.asarray(_figures(operation, [run[first : first + length] for run in block], start + first))
            for first in range(0, block[0].count, length)
        )
        return reduce(operator.add, parts)

    def figures(self, operation: Statistic, block: Sequence[Run]) -> list[float]:
        """Return the figures of one block."""
        return list(_figures(operation, block, 0))


C_OPS = COps()


def does(operation: Merge | Statistic, kind: TensorKind) -> bool:
    """Return whether there is a C function for an operation on a tensor in the memory of the CPU."""
    if isinstance(operation, op.Cast):
        source, *output = kind.dtypes
        return source == "float32" and kind.rounding_key is None and serve(output)
    if not serve(kind.dtypes):
        return False
    match operation:
        case op.WeightedSum():
            return kind.rounding_key is None and _can_keep(operation.masks, kind)
        case op.Election():
            return kind.rounding_key is None and isinstance(operation.kept, tuple) and _can_keep(operation.kept, kind)
        case op.Lengths():
            return _can_keep(operation.masks, kind)
        case op.CountUpperBits() | op.CountLowerBits() | op.CompareSizes() | op.CountEqual():
            return isinstance(operation.quantities, DeltaSizes)
    return isinstance(operation, op.AllFinite | op.InnerProducts | op.Step | op.Sizes)


def _can_keep(masks: Masks, kind: TensorKind) -> bool:
    """Return whether C can keep to the masks: it draws by one key, which serves no more elements than that."""
    return kind.elements <= 2 * draws.WORDS or not any(isinstance(mask, op.ByChance | op.ByRank) for mask in masks)


def _figures(operation: Statistic, block: Sequence[Run], start: int) -> Sequence[float] | npt.NDArray[Any]:
    match operation:
        case op.AllFinite():
            return [float(bool(_call("all_finite", block[0])))]
        case op.InnerProducts():
            return inner_products(block, operation.from_base)
        case op.Step():
            out, base, origin = block  # seen from the origin: ⟨out, out⟩, ⟨−δ, out⟩, ⟨−δ, −δ⟩
            _, against_delta, square = inner_products([origin, out, base], has_base=True)
            return [-against_delta, square]
        case op.Lengths():
            keeps, row = _keeps_of(operation.masks, len(block) - 1)
            return lengths(block, keeps, start, row)
        case op.Sizes():
            return _sizes(operation, block, start)
        case op.CountUpperBits():
            pairs = _pairs(operation.quantities, block)
            counts = np.zeros((len(pairs), op.UPPER), np.int64)
            for counted, pair in zip(counts, pairs, strict=True):
                _call("count_upper_bits", counted.ctypes.data, *pair)
            return counts
        case op.CountLowerBits():
            pairs = _pairs(operation.quantities, block)
            counts = np.zeros((len(operation.bins), op.LOWER), np.int64)
            for counted, (number, first) in zip(counts, operation.bins, strict=True):
                _call("count_lower_bits", counted.ctypes.data, op.LOWER, *pairs[number], first)
            return counts
        case op.CompareSizes():
            return _compared(operation, block, start)
        case op.CountEqual():
            return _equal(operation, block, start)
    raise AssertionError(operation)  # ``does`` says which there are


def _sizes(operation: op.Sizes, block: Sequence[Run], start: int) -> npt.NDArray[Any]:
    base, *models = block
    if operation.squared:
        sums = [inner_products([base, model], has_base=True)[0] for model in models]
    else:
        sums = lengths(block, [Keep(EVERYTHING)] * len(models), start)[: len(models)]
    return np.array([*sums, base.count]) * operation.factor


def _compared(operation: op.CompareSizes, block: Sequence[Run], start: int) -> npt.NDArray[Any]:
    counts = np.zeros(operation.shape, np.int64)
    pairs, first = _pairs(operation.quantities, block), operation.origin + start
    for row, (base, model), thresholds in zip(counts, pairs, operation.thresholds, strict=True):
        for threshold, counted in zip(thresholds, row, strict=False):
            counted[0] = base.count
            _call("compare_sizes", counted[1:].ctypes.data, base, model, threshold, first, operation.step)
    return counts


def _equal(operation: op.CountEqual, block: Sequence[Run], start: int) -> npt.NDArray[Any]:
    counts = np.zeros((len(operation.equals), 2 + op.BUCKETS), np.int64)
    first = operation.origin + start
    part = slice(max(operation.begin - first, 0), operation.begin + operation.width - first)
    pairs = _pairs(operation.quantities, block)
    for row, (number, threshold) in zip(counts, operation.equals, strict=True):
        base, model = (run[part] for run in pairs[number])
        begin = first + part.start - operation.begin
        _call("compare_sizes", row.ctypes.data, base, model, threshold, begin, operation.step)
    return counts[:, 2:]


def _pairs(quantities: op.Quantities, block: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Return the base and the model whose distance each quantity is."""
    assert isinstance(quantities, DeltaSizes)
    return [(block[0], block[1 + model]) for model in quantities.models]


def _keeps_of(masks: Masks, models: int) -> tuple[list[Keep], int]:
    """Return what is kept of each model, and the length of a row where rows are ranked, else 0."""
    rows = [mask.columns for mask in masks if isinstance(mask, op.ByRank)]
    return [_keep_of(mask) for mask in masks or (None,) * models], rows[0] if rows else 0


def _keep_of(mask: op.Mask) -> Keep:
    match mask:
        case op.BySize():
            high = mask.outliers or op.Cut(math.inf, 0)
            low = mask.largest
            return Keep(BY_SIZE, low=low.threshold, low_end=low.end, high=high.threshold, high_end=high.end)
        case op.ByChance():
            return Keep(BY_CHANCE, key=mask.key, limit=op.draw_limit(mask.share))
        case op.ByRank():
            steps = mask.columns - 1
            lowest, half_step = (mask.share - mask.reach, mask.reach / steps) if steps > 0 else (mask.share, 0.0)
            return Keep(BY_RANK, key=mask.key, lowest=lowest, half_step=half_step, divide=mask.divide)
    return Keep(EVERYTHING)


def serve(dtypes: Collection[str]) -> bool:
    """Return whether the kernels can be used on tensors of these dtypes, one for each, in the memory of the CPU."""
    return compiled() is not None and len(dtypes) <= MOST_TENSORS and all(dtype in DTYPES for dtype in dtypes)


def take(*tensors: torch.Tensor) -> bool:
    """Return whether the kernels can be used on these tensors."""
    return serve([name_of(tensor.dtype) for tensor in tensors]) and all(
        tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors
    )


def lengths(block: Sequence[Run], keeps: Sequence[Keep], start: int, row: int = 0) -> list[float]:
    """Return Σ|δ| of each model, then of what is kept of each."""
    sums = (c_double * (2 * len(keeps)))()
    _call("lengths", sums, *_parted(block, True), _keeps(keeps), row, start)
    return list(sums)


def inner_products(block: Sequence[Run], has_base: bool) -> list[float]:
    """Return the lower triangle, row by row, of the inner products of the deltas, or without a base of the models."""
    n = len(block) - has_base
    products = (c_double * (n * (n + 1) // 2))()
    _call("inner_products", products, *_parted(block, has_base))
    return list(products)


def _parted(block: Sequence[Run], has_base: bool) -> tuple[Run | None, object, int]:
    models = block[has_base:]
    return block[0] if has_base else None, (Run * len(models))(*models), len(models)


def _floats(numbers: Sequence[float]) -> object:
    return (c_float * len(numbers))(*numbers)


def _keeps(keeps: Sequence[Keep]) -> object:
    return (Keep * len(keeps))(*keeps)


def _call(name: str, *arguments: object) -> object:
    return getattr(compiled(), name)(*arguments)
