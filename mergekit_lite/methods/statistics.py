"""Statistics built from sums: inner products, and the exact threshold of the k largest without a sort.

The bit pattern of a non-negative float32, read as an integer, orders like the value. So one pass counts the upper 16
bits, which tells the bin of the k-th largest, and a second one the lower 16 bits within that bin: the threshold is
exact, for any number of elements, with a fixed amount of memory. Where only some of the elements equal to the threshold
are among the k, those with the lowest index are: they are counted in buckets of indices, and the passes after that
visit nothing but the bucket that holds the last of them.

Counting bits costs ten times as much as comparing. Weights of 16 bits differ by few different amounts, so the threshold
of a small sample, or one as near to it as the sample can tell, is nearly always that of the whole: one pass of
comparisons proves it. Where it does not, the bits are counted after all. The sample decides how long it takes, never
what is found.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mergekit_lite.deferred import np, torch
from mergekit_lite.methods.passes import Block, Combine, Reduction, TensorInfo, Totals, deltas
from mergekit_lite.ops import c_ops

UPPER = (1 << 15) + 1  # bins of the upper bits: the first one is for zero alone, so that the rest counts the others
LOWER = 1 << 16
BUCKETS = 1 << 12
ALL = sys.maxsize  # an index beyond every element
RUN = 128
WORTH_SAMPLING = 1 << 18  # elements
DEVIATIONS = 4  # of the rank that a sample's threshold has in the whole, to either side

Quantities: TypeAlias = "Callable[[Block, int], Sequence[torch.Tensor]]"  # (block, index of its first element)
Counts = Callable[[int, int, int], Sequence[int]]  # (number of the quantity, its elements, those that aren't zero)


def gram(from_base: bool) -> Generator[Reduction, Totals, Totals]:
    """Inner products of a tensor's n inputs, or of what n models add to a base: float64 (n, n)."""

    def of(block: Block, _: int) -> torch.Tensor:
        wide = [vector.flatten().double() for vector in (deltas(block) if from_base else block)]
        return torch.stack([torch.dot(a, b) for i, a in enumerate(wide) for b in wide[: i + 1]])

    lower = yield Reduction(of, kernel=lambda block, _: np.array(c_ops.inner_products(block, from_base)))
    count = math.isqrt(2 * len(lower))
    products = np.zeros((count, count))
    rows, columns = np.tril_indices(count)
    products[rows, columns] = products[columns, rows] = lower
    return products


def total(sizes: torch.Tensor) -> torch.Tensor:
    """The sum of numbers that are not negative: float64 scalar.

    Many in float32 are summed in it by runs of 128, and beyond in float64: that costs a third of float64 throughout,
    and what it leaves out is a few billionths of the sum.
    """
    flat = sizes.flatten()
    runs = flat.numel() // RUN * RUN if flat.dtype == torch.float32 and flat.numel() >= RUN**2 else 0
    return flat[:runs].view(-1, RUN).sum(1).double().sum() + flat[runs:].double().sum()


@dataclass(frozen=True)
class Cut:
    """The k largest: those above ``threshold``, and of those equal to it the ones whose index is below ``end``."""

    threshold: float
    end: int

    def mask(self, quantity: torch.Tensor, start: int) -> torch.Tensor:
        """1.0 for the k largest, 0.0 for the others: float32 of the quantity's shape.

        Args:
            quantity: one block of it.
            start: the index of its first element.
        """
        mask = torch.empty_like(quantity)  # comparing into floats: bool tensors cost four times as much
        equal = self._equal(quantity, start)
        if equal == quantity.numel():
            return torch.ge(quantity, self.threshold, out=mask)
        torch.gt(quantity, self.threshold, out=mask)
        if equal:
            torch.ge(quantity.view(-1)[:equal], self.threshold, out=mask.view(-1)[:equal])
        return mask

    def largest(self, delta: torch.Tensor, start: int) -> torch.Tensor:
        """The block with all but its elements of the k largest magnitudes zeroed, where magnitudes are the quantity.

        Args:
            delta: one block of what the magnitudes are of, float32 or float64.
            start: the index of its first element.
        """
        if delta.dtype != torch.float32:  # magnitudes are compared as float32
            return delta * self.mask(delta.abs().float(), start)
        equal = self._equal(delta, start)
        if equal == delta.numel():
            return torch.nn.functional.hardshrink(delta, _below(self.threshold))
        above = torch.nn.functional.hardshrink(delta, self.threshold)
        if equal:
            above.view(-1)[:equal] = torch.nn.functional.hardshrink(delta.view(-1)[:equal], _below(self.threshold))
        return above

    def _equal(self, block: torch.Tensor, start: int) -> int:
        """How many of the block's elements, from the first one on, are kept when equal to the threshold."""
        return min(max(self.end - start, 0), block.numel())


def largest(
    info: TensorInfo,
    quantities: Quantities,
    counts: Counts,
    group: str | None = None,
    sampled: bool = True,
    of_models: Sequence[int] = (),
) -> Generator[Reduction, Totals, list[list[Cut]]]:
    """Find the k largest of several quantities at once, each for one k or more.

    Args:
        info: the tensor.
        quantities: (block, index of its first element) to non-negative float32 tensors of its shape.
        counts: (number of the quantity, its elements, those that aren't zero) to the values of k.
        group: count over all tensors of this group instead of the tensor alone; indices are then the model's.
        sampled: whether the quantities can be had of elements picked from anywhere, so that a sample may be tried.
        of_models: for kernels: the quantities are the sizes of what these models add to the base, where they are.

    Returns:
        For each quantity a cut for each k.
    """
    origin, extent = (info.offset, info.extent) if group is not None else (0, info.numel)
    place = _Place(quantities, group, origin, of_models)
    found: list[list[_Search]] | None = None
    if sampled and (group is not None or info.numel >= WORTH_SAMPLING):
        guesses = yield from _by_bits(place, _around(counts), sampled=True)
        found = yield from _proven(place, counts, guesses, extent)
    if found is None:
        found = yield from _by_bits(place, counts)

    # ties that have to be split: first for all at once, then each within its bucket
    tied = [search for row in found for search in row if search.is_tied]
    wide = [search for search in tied if search.width == 0]
    if wide:
        for search in wide:
            search.width = extent
        yield from _narrow(wide, place)
    for search in tied:
        while search.width > 1:
            yield from _narrow([search], place)
        search.end = search.begin + 1
    return [[Cut(search.threshold, search.end) for search in row] for row in found]


@dataclass(frozen=True)
class _Place:
    """What is counted: the quantities of a tensor or of a group, and the place of the tensor's first element."""

    quantities: Quantities
    group: str | None
    origin: int
    of_models: Sequence[int]

    def request(
        self,
        of: Combine,
        kernel: Callable[[Sequence[c_ops.Run], int], Totals],
        within: tuple[int, int] | None = None,
        sampled: bool = False,
    ) -> Reduction:
        """The sums to ask for; by the kernel only where it knows the quantities."""
        return Reduction(of, self.group, within, sampled, kernel if self.of_models else None)

    def pair(self, block: Sequence[c_ops.Run], number: int) -> tuple[c_ops.Run, c_ops.Run]:
        """The base and the model whose distance a quantity is."""
        return block[0], block[1 + self.of_models[number]]


@dataclass
class _Search:
    """The search for one cut: the ``wanted`` largest of what is left.

    ``bits`` is what is known of the threshold's bit pattern, ``equal`` the number of elements that share it, and
    ``begin``, ``width`` the range of indices in which the last wanted one of them lies; a width of 0 is all.
    """

    number: int  # of the quantity
    wanted: int
    bits: int = -1
    equal: int = 0
    begin: int = 0
    width: int = 0
    end: int = ALL

    @property
    def threshold(self) -> float:
        if self.bits < 0:
            return math.inf  # k = 0: nothing is above it, and no finite number equals it
        return float(np.int32(self.bits).view(np.float32))

    @property
    def is_tied(self) -> bool:
        return 0 < self.wanted < self.equal

    def descend(self, histogram: Totals, first: int) -> None:
        """Take the bin of the k-th largest, of those whose counts are given from the bits ``first`` on."""
        from_top = histogram[::-1].cumsum()
        wanted = min(self.wanted, int(from_top[-1]))
        place = int(np.searchsorted(from_top, wanted))
        bin = len(histogram) - 1 - place
        self.equal = int(histogram[bin])
        self.wanted = wanted - int(from_top[place]) + self.equal
        self.bits = first + bin

    def ascend(self, counts: Totals, step: int) -> None:
        """Take the bucket of indices in which the last wanted one lies; the last where the threshold is NaN."""
        up_to = counts.cumsum()
        bucket = min(int(np.searchsorted(up_to, self.wanted)), len(counts) - 1)
        self.wanted -= int(up_to[bucket] - counts[bucket])
        self.begin += bucket * step
        self.width = step


def _by_bits(place: _Place, wanted: Counts, sampled: bool = False) -> Generator[Reduction, Totals, list[list[_Search]]]:
    """Find the thresholds by counting bit patterns: for each quantity a search for each k that is wanted."""

    def upper_bits(block: Block, start: int) -> torch.Tensor:
        return torch.stack([_upper(quantity) for quantity in place.quantities(block, start)])

    def upper_bits_by_kernel(block: Sequence[c_ops.Run], _: int) -> Totals:
        pairs = [place.pair(block, number) for number in range(len(place.of_models))]
        return np.stack([c_ops.count_upper_bits(UPPER, *pair) for pair in pairs])

    upper = yield place.request(upper_bits, upper_bits_by_kernel, sampled=sampled)
    elements = int(upper[0].sum())
    found = [
        [_Search(number, k) for k in wanted(number, elements, int(row[1:].sum()))] for number, row in enumerate(upper)
    ]
    active = [search for row in found for search in row if search.wanted > 0]
    for search in active:
        search.descend(upper[search.number], first=0)

    # within the bin; zeros have theirs for themselves
    if inner := [search for search in active if search.bits > 0]:
        for search in inner:
            search.bits = ((search.bits - 1) << 16) + 1
        bins = list(dict.fromkeys((search.number, search.bits) for search in inner))

        def within_bins(block: Block, start: int) -> torch.Tensor:
            made = place.quantities(block, start)
            counts = torch.empty(
                len(bins), LOWER, dtype=torch.int32 if sampled else torch.int64, device=block[0].device
            )
            for row, (number, first) in zip(counts, bins, strict=True):
                row.copy_(_lower(made[number], first))
            return counts

        def within_bins_by_kernel(block: Sequence[c_ops.Run], _: int) -> Totals:
            return np.stack(
                [c_ops.count_lower_bits(LOWER, *place.pair(block, number), first) for number, first in bins]
            )

        counted = yield place.request(within_bins, within_bins_by_kernel, sampled=sampled)
        lower = dict(zip(bins, counted, strict=True))
        for search in inner:
            search.descend(lower[search.number, search.bits], first=search.bits)
    return found


def _around(counts: Counts) -> Counts:
    """For a sample: each k, and as far off as it may be, so that one of three thresholds is mostly the whole's."""

    def widened(number: int, elements: int, positive: int) -> list[int]:
        found = []
        for k in counts(number, elements, positive):
            margin = 1 + int(DEVIATIONS * math.sqrt(k * (elements - k) / max(1, elements)))
            found += [min(max(1, k + off), elements) for off in (0, -margin, margin)]
        return found

    return widened


def _proven(
    place: _Place, counts: Counts, guesses: list[list[_Search]], extent: int
) -> Generator[Reduction, Totals, list[list[_Search]] | None]:
    """Count what is above and what equals the thresholds of a sample; None where none of them is one of the whole's."""
    step = -(-extent // BUCKETS)
    tried = [sorted({guess.bits: guess for guess in row}.items()) for row in guesses]
    shape = (len(tried), max(map(len, tried)), 3 + BUCKETS)  # elements, above zero, above the threshold, equal to it

    def compared(block: Block, start: int) -> torch.Tensor:
        total = torch.zeros(shape, dtype=torch.int64, device=block[0].device)
        for row, quantity, guessed in zip(total, place.quantities(block, start), tried, strict=True):
            mask = torch.empty_like(quantity)
            positive = torch.gt(quantity, 0, out=mask).sum()  # whole numbers up to 2²⁴ are exact in float32
            for (_, guess), counted in zip(guessed, row, strict=False):
                counted[0], counted[1] = quantity.numel(), positive
                counted[2] = torch.gt(quantity, guess.threshold, out=mask).sum()
                torch.eq(quantity, guess.threshold, out=mask)
                _add_to_buckets(counted[3:], mask.view(-1), place.origin + start, step)
        return total

    def compared_by_kernel(block: Sequence[c_ops.Run], start: int) -> Totals:
        total = np.zeros(shape, np.int64)
        for number, (row, guessed) in enumerate(zip(total, tried, strict=True)):
            base, model = place.pair(block, number)
            for (_, guess), counted in zip(guessed, row, strict=False):
                counted[0] = base.count
                c_ops.compare_sizes(counted[1:], base, model, guess.threshold, place.origin + start, step)
        return total

    totals = yield place.request(compared, compared_by_kernel)
    found: list[list[_Search]] = []
    for number, (guessed, row) in enumerate(zip(tried, totals, strict=True)):
        found.append([])
        for k in counts(number, int(row[0, 0]), int(row[0, 1])):
            search = _Search(number, 0) if k == 0 else _fitting(number, k, guessed, row, step)
            if search is None:
                return None
            found[-1].append(search)
    return found


def _fitting(number: int, k: int, guessed: Sequence[tuple[int, _Search]], row: Totals, step: int) -> _Search | None:
    """The search for the k largest at that of the guessed thresholds which is theirs; None where none is."""
    for (bits, _), counted in zip(guessed, row, strict=False):
        search = _Search(number, k - int(counted[2]), bits, equal=int(counted[3:].sum()))
        if 0 < search.wanted <= search.equal:
            if search.is_tied:
                search.ascend(counted[3:], step)
            return search
    return None


def _narrow(searches: list[_Search], place: _Place) -> Generator[Reduction, Totals, None]:
    """Narrow the ranges of indices, which must be the same in all the searches, to one bucket each."""
    begin, width = searches[0].begin, searches[0].width
    step = -(-width // BUCKETS)

    def in_buckets(block: Block, start: int) -> torch.Tensor:
        made = place.quantities(block, start)
        counts = torch.zeros(len(searches), BUCKETS, dtype=torch.int64, device=block[0].device)
        first = place.origin + start
        wanted = slice(max(begin - first, 0), max(begin + width - first, 0))
        for row, search in zip(counts, searches, strict=True):
            part = made[search.number].flatten()[wanted]
            equal = torch.eq(part, search.threshold, out=torch.empty_like(part))
            _add_to_buckets(row, equal, first + wanted.start - begin, step)
        return counts

    def in_buckets_by_kernel(block: Sequence[c_ops.Run], start: int) -> Totals:
        counts = np.zeros((len(searches), 2 + BUCKETS), np.int64)
        first = place.origin + start
        part = slice(max(begin - first, 0), min(begin + width - first, block[0].count))
        for row, search in zip(counts, searches, strict=True):
            base, model = (run.part(part) for run in place.pair(block, search.number))
            c_ops.compare_sizes(row, base, model, search.threshold, first + part.start - begin, step)
        return counts[:, 2:]

    within = (max(begin - place.origin, 0), max(begin + width - place.origin, 0))
    counted = yield place.request(in_buckets, in_buckets_by_kernel, within)
    for search, row in zip(searches, counted, strict=True):
        search.ascend(row, step)


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


def _below(threshold: float) -> float:
    """The float32 before a threshold: what ``hardshrink`` has to zero so that the threshold itself is kept."""
    return float(np.nextafter(np.float32(threshold), np.float32(-math.inf)))


def _upper(quantity: torch.Tensor) -> torch.Tensor:
    """Histogram of the upper 16 bits. Taking 1 off first gives zero, and nothing else, the first bin."""
    bits = _bits(quantity)
    return torch.bincount(((bits - 1) >> 16).add_(1), minlength=UPPER)


def _lower(quantity: torch.Tensor, first: int) -> torch.Tensor:
    """Histogram of the 2¹⁶ bit patterns from ``first`` on; all others fall into two bins that are cut off."""
    bits = _bits(quantity) - first
    return torch.bincount(bits.clamp_(-1, LOWER).add_(1), minlength=LOWER + 2)[1:-1]


def _bits(quantity: torch.Tensor) -> torch.Tensor:
    """The bit patterns without the sign, which a NaN may have."""
    return quantity.flatten().view(torch.int32) & 0x7FFFFFFF
