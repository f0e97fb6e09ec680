"""Every operation by torch: on any device, in any dtype, and the functions of methods that no operation is for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergekit_lite import draws, dtypes, rounding
from mergekit_lite.deferred import torch
from mergekit_lite.ops import operations as op
from mergekit_lite.ops.operations import Block, Masks, Merge, Statistic, TensorKind

if TYPE_CHECKING:
    import numpy.typing as npt

RUN = 128  # elements that are summed in float32
LEVELS = 1025  # of magnitude, by which elements are ranked
AS_STORED = (op.Cast, op.AllFinite)  # operations on elements in their own dtype


@dataclass(frozen=True)
class TorchOps:
    """The backend for one tensor on one device."""

    kind: TensorKind
    device: str

    needs_torch = True

    def of_bytes(self, chunk: memoryview, dtype: str) -> torch.Tensor:
        """Return the elements that some bytes are, which they share: 1-D."""
        return torch.frombuffer(chunk, dtype=dtypes.torch_dtype(dtype))

    def of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as it is."""
        return tensor

    def merge(
        self,
        operation: Merge,
        block: Sequence[Any],
        start: int,
        out: torch.Tensor,
        length: int,
        observed: op.Observed = op.NOTHING,
    ) -> list[list[float]]:
        """Merge a block into ``out``, ``length`` elements at a time, rounded to its dtype."""
        figures: Block = []
        with torch.inference_mode():
            for first in range(0, out.numel(), length):
                place = slice(first, first + length)
                part = self.at_hand([tensor[place] for tensor in block])
                result = merged(operation, self._widened(part, operation), start + first).reshape(-1)
                if self.kind.rounding_key is not None:
                    result = rounding.stochastic(result, out.dtype, self.kind.rounding_key, start + first)
                out[place].copy_(result, non_blocking=True)
                for grain in observed.grains:
                    if first <= grain.start < first + length:
                        here = slice(grain.start - first, grain.stop - first)
                        seen = [result[here].to(out.dtype), *(tensor[here] for tensor in part)]
                        figures.append(figures_of(observed.figures, self._widened(seen, observed.figures), 0))
            return torch.stack(figures).tolist() if figures else []

    def at_hand(self, block: Sequence[Any]) -> Block:
        """Return a block on the device, on its way there where it is in memory."""
        return [tensor.to(self.device, non_blocking=True) for tensor in block]

    def sum(self, operation: Statistic, block: Sequence[Any], start: int, length: int) -> npt.NDArray[Any]:
        """Return the figures over a block, added up over parts of ``length`` elements."""
        total: torch.Tensor | None = None
        with torch.inference_mode():
            for first in range(0, block[0].numel(), length):
                part = self.at_hand([tensor[first : first + length] for tensor in block])
                figures = figures_of(operation, self._widened(part, operation), start + first)
                # Kept parts would lie between the freed temporaries, and the heap would grow with every block.
                total = figures.clone() if total is None else total.add_(figures)
            assert total is not None
            array: npt.NDArray[Any] = total.cpu().numpy()
        return array

    def figures(self, operation: Statistic, block: Sequence[Any]) -> list[float]:
        """Return the figures of one block."""
        with torch.inference_mode():
            part = self._widened(self.at_hand(block), operation)
            figures: list[float] = figures_of(operation, part, 0).tolist()
        return figures

    @cached_property
    def _working(self) -> torch.dtype:
        return dtypes.working(self.kind.dtypes)

    def _widened(self, stored: Block, operation: Merge | Statistic) -> Block:
        """Return the tensors in the dtype that is computed in, in rows where the method wants rows."""
        if isinstance(operation, AS_STORED):
            return stored
        wide = [tensor.to(self._working) for tensor in stored]
        return [tensor.view(-1, self.kind.row) for tensor in wide] if self.kind.row else wide


def merged(operation: Merge, block: Block, start: int) -> torch.Tensor:
    """Return a merged block.

    ``block`` holds the inputs in the working dtype, which stay as they are; ``start`` is the index of the first.
    """
    match operation:
        case op.Cast():
            return block[0]
        case op.WeightedSum():
            return _weighted_sum(operation, block, start)
        case op.Election():
            kept = operation.kept
            sparse = kept(block, start) if callable(kept) else _masked(kept, deltas(block), start)
            return _elected(operation, block[0], sparse)
    return operation(block, start)


def figures_of(operation: Statistic, block: Block, start: int) -> torch.Tensor:
    """Return the figures of a block; arguments as of ``merged``."""
    match operation:
        case op.AllFinite():
            return _all_finite(block[0])
        case op.InnerProducts():
            wide = [vector.flatten().double() for vector in (deltas(block) if operation.from_base else block)]
            return torch.stack([torch.dot(a, b) for i, a in enumerate(wide) for b in wide[: i + 1]])
        case op.Step():
            out, base, origin = (tensor.double() for tensor in block)
            delta = origin - base
            return torch.stack([torch.dot(out - origin, delta), torch.dot(delta, delta)])
        case op.Lengths():
            sizes = [delta.abs_() for delta in deltas(block)]
            before = [total(size) for size in sizes]
            return torch.stack([*before, *(total(size) for size in _masked(operation.masks, sizes, start))])
        case op.Sizes():
            sums = [_square(delta) if operation.squared else total(delta.abs_()) for delta in deltas(block)]
            return torch.stack([*sums, sums[0].new_full((), block[0].numel())]) * operation.factor
        case op.CountUpperBits():
            return torch.stack([_upper(quantity) for quantity in operation.quantities(block, start)])
        case op.CountLowerBits():
            quantities = operation.quantities(block, start)
            return torch.stack([_lower(quantities[number], first) for number, first in operation.bins])
        case op.CompareSizes():
            return _compared(operation, block, start)
        case op.CountEqual():
            return _equal(operation, block, start)
    return operation(block, start)


def deltas(block: Block) -> Block:
    """Return what each model of a block adds to the base: new tensors, free to be changed in place."""
    return [tensor - block[0] for tensor in block[1:]]


def weighted_sum(tensors: Block, coefficients: Sequence[float]) -> torch.Tensor:
    """Return Σ coefficient·tensor over at least one tensor of one shape and dtype: a new tensor."""
    total = tensors[0] * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total.add_(tensor * coefficient)
    return total


def total(sizes: torch.Tensor) -> torch.Tensor:
    """Return the sum of numbers that are not negative: float64 scalar.

    Many in float32 are summed in it by runs of 128, and beyond in float64: that costs a third of float64 throughout,
    and what it leaves out is a few billionths of the sum.
    """
    flat = sizes.flatten()
    runs = flat.numel() // RUN * RUN if flat.dtype == torch.float32 and flat.numel() >= RUN**2 else 0
    return flat[:runs].view(-1, RUN).sum(1).double().sum() + flat[runs:].double().sum()


# --- merges ---------------------------------------------------------------------------------------------------------


def _weighted_sum(operation: op.WeightedSum, block: Block, start: int) -> torch.Tensor:
    block = [block[number] for number in operation.order] if operation.order else block
    terms = _masked(operation.masks, deltas(block), start) if operation.from_base else block
    total = weighted_sum(terms, operation.coefficients)
    if operation.divisor != 1:
        # by a tensor: by a number, CUDA would multiply by its rounded reciprocal
        total.div_(total.new_full((), operation.divisor))
    return total.add_(block[0]) if operation.from_base else total


def _elected(election: op.Election, base: torch.Tensor, sparse: Block) -> torch.Tensor:
    """Return the base with what has the elected sign added; the sparse deltas are used up."""
    for delta, vote in zip(sparse, election.votes, strict=True):
        delta.mul_(vote)
    total = sparse[0].clone()
    for delta in sparse[1:]:
        total.add_(delta)
    signs = total.ge_(0).mul_(2).sub_(1)
    for delta in sparse:
        delta.mul_(signs).clamp_(min=0)
    support = None if election.weights is None else _support(sparse, election.weights)
    merged = sparse[0].mul_(election.shares[0])
    for size, share in zip(sparse[1:], election.shares[1:], strict=True):
        merged.add_(size.mul_(share))
    merged.mul_(signs.mul_(election.scale))
    if support is not None:
        merged.div_(support)
    return merged.add_(base)


def _support(sizes: Block, weights: Sequence[float]) -> torch.Tensor:
    """Return per element the sum of the weights of those that agree; never zero, so that it can divide.

    ``sizes`` are |vote| where it agrees, 0 where it doesn't. Where no weight is below zero, a sum of zero divides
    nothing but zeros, and becomes the smallest number; else 1.
    """
    mask = torch.empty_like(sizes[0])
    total = torch.gt(sizes[0], 0, out=mask) * weights[0]
    for size, weight in zip(sizes[1:], weights[1:], strict=True):
        total.add_(torch.gt(size, 0, out=mask).mul_(weight))
    if all(weight >= 0 for weight in weights):
        return total.clamp_(min=torch.finfo(total.dtype).tiny)
    return total.add_(torch.eq(total, 0, out=mask))


# --- masks ----------------------------------------------------------------------------------------------------------


def _masked(masks: Masks, moved: Block, start: int) -> Block:
    """Return what is kept of the deltas, or of their sizes; maybe in place."""
    if not masks:
        return moved
    return [_masked_one(mask, delta, start) for mask, delta in zip(masks, moved, strict=True)]


def _masked_one(mask: op.Mask, delta: torch.Tensor, start: int) -> torch.Tensor:
    match mask:
        case op.BySize():
            kept = mask.largest.largest(delta, start)
            return kept if mask.outliers is None else kept.sub_(mask.outliers.largest(delta, start))
        case op.ByChance():
            return delta.mul_(_draws(mask.key, start, delta).lt_(op.draw_limit(mask.share)))
        case op.ByRank():
            chances = _chances(_levels(delta), mask.share - mask.reach, mask.share + mask.reach)
            drawn = _draws(mask.key, start, delta).lt_(op.draw_limit(chances))
            return delta.mul_(drawn.div_(chances) if mask.divide else drawn)
    return delta


def _draws(key: int, start: int, like: torch.Tensor) -> torch.Tensor:
    """Return a draw for each element of a block, uniform over the 16-bit integers, of the block's shape and dtype."""
    return draws.halves(key, start, like.numel(), like.device).to(like.dtype).view(like.shape)


def _levels(delta: torch.Tensor) -> torch.Tensor:
    """Return the magnitudes of each row to 7 significant bits, as whole numbers from 0 to ``LEVELS`` − 1.

    The last is the row's largest. There are 64 levels to a factor of two, down to 2⁻¹⁶ of the largest; what is smaller
    still has level 0.
    """
    coarse = delta.abs().float().view(torch.int32) >> 17
    return coarse.sub_(coarse.amax(1, keepdim=True) - (LEVELS - 1)).clamp_(min=0)


def _chances(levels: torch.Tensor, lowest: float, highest: float) -> torch.Tensor:
    """Return probabilities that rise with the rank of the level in its row: float32 of the same shape.

    Equal levels share their mean rank, so that the mean of each row is that of ``lowest`` and ``highest``.
    """
    rows, columns = levels.shape
    if columns < 2:
        return torch.full_like(levels, (lowest + highest) / 2, dtype=torch.float32)
    step = (highest - lowest) / (columns - 1)
    if columns < LEVELS // 4:  # counting by level would cost more than sorting
        ordered = levels.sort(1).values
        ends = torch.searchsorted(ordered, levels, right=True) + torch.searchsorted(ordered, levels)
        return (ends - 1).mul(0.5 * step).add_(lowest).float()
    # Count the elements of each level, row by row in one histogram: row r's level l has the bin r·LEVELS + l.
    places = levels + torch.arange(0, rows * LEVELS, LEVELS, dtype=torch.int32, device=levels.device)[:, None]
    counts = torch.bincount(places.view(-1), minlength=rows * LEVELS).view(rows, LEVELS)
    # A level's elements have the ranks up to its cumulated count; twice their mean is 2·cumulated − count − 1.
    ranks = counts.cumsum(1).mul_(2).sub_(counts).sub_(1)
    return ranks.mul(0.5 * step).add_(lowest).float().view(-1).index_select(0, places.view(-1)).view(levels.shape)


# --- figures --------------------------------------------------------------------------------------------------------


def _all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Return [1.0] or [0.0]. One fast sum answers for almost every tensor: a NaN or infinity stays in it."""
    total = tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)
    return total.new_tensor([math.isfinite(total.item()) or bool(torch.isfinite(tensor).all())])


def _square(delta: torch.Tensor) -> torch.Tensor:
    wide = delta.flatten().double()
    return torch.dot(wide, wide)


def _upper(quantity: torch.Tensor) -> torch.Tensor:
    """Return the histogram of the upper 16 bits. Taking 1 off first gives zero, and nothing else, the first bin."""
    bits = _bits(quantity)
    return torch.bincount(((bits - 1) >> 16).add_(1), minlength=op.UPPER)


def _lower(quantity: torch.Tensor, first: int) -> torch.Tensor:
    """Return the histogram of the 2¹⁶ bit patterns from ``first`` on; others fall into two bins that are cut off."""
    bits = _bits(quantity) - first
    return torch.bincount(bits.clamp_(-1, op.LOWER).add_(1), minlength=op.LOWER + 2)[1:-1]


def _bits(quantity: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns without the sign, which a NaN may have."""
    return quantity.flatten().view(torch.int32) & 0x7FFFFFFF


def _compared(operation: op.CompareSizes, block: Block, start: int) -> torch.Tensor:
    counts = torch.zeros(operation.shape, dtype=torch.int64, device=block[0].device)
    quantities = operation.quantities(block, start)
    for row, quantity, thresholds in zip(counts, quantities, operation.thresholds, strict=True):
        mask = torch.empty_like(quantity)
        positive = torch.gt(quantity, 0, out=mask).sum()  # whole numbers up to 2²⁴ are exact in float32
        for threshold, counted in zip(thresholds, row, strict=False):
            counted[0], counted[1] = quantity.numel(), positive
            counted[2] = torch.gt(quantity, threshold, out=mask).sum()
            torch.eq(quantity, threshold, out=mask)
            _add_to_buckets(counted[3:], mask.view(-1), operation.origin + start, operation.step)
    return counts


def _equal(operation: op.CountEqual, block: Block, start: int) -> torch.Tensor:
    quantities = operation.quantities(block, start)
    counts = torch.zeros(len(operation.equals), op.BUCKETS, dtype=torch.int64, device=block[0].device)
    first = operation.origin + start
    wanted = slice(max(operation.begin - first, 0), max(operation.begin + operation.width - first, 0))
    for row, (number, threshold) in zip(counts, operation.equals, strict=True):
        part = quantities[number].flatten()[wanted]
        equal = torch.eq(part, threshold, out=torch.empty_like(part))
        _add_to_buckets(row, equal, first + wanted.start - operation.begin, operation.step)
    return counts


def _add_to_buckets(counts: torch.Tensor, ones: torch.Tensor, first: int, step: int) -> None:
    """Add up ones, of which the first has the index ``first``, by index: bucket i holds those from i·step on."""
    stop = first + len(ones)
    inner = min(-(-first // step) * step, stop)  # from here on, whole buckets
    outer = max(stop // step * step, inner)  # up to here
    if first < inner:
        counts[first // step] += ones[: inner - first].sum().long()
    if inner < outer:
        counts[inner // step : outer // step] += ones[inner - first : outer - first].view(-1, step).sum(1).long()
    if outer < stop:
        counts[outer // step] += ones[outer - first :].sum().long()
