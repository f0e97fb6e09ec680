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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mergekit_lite.deferred import np
from mergekit_lite.methods.contract import Gathering, Reduction, TensorInfo, Totals
from mergekit_lite.ops import operations as op

WORTH_SAMPLING = 1 << 18  # elements
DEVIATIONS = 4  # of the rank that a sample's threshold has in the whole, to either side

Counts = Callable[[int, int, int], Sequence[int]]  # (number of the quantity, its elements, those that aren't zero)


def gram(from_base: bool) -> Gathering[Totals]:
    """Find the inner products of a tensor's n inputs, or of what n models add to a base: float64 (n, n)."""
    lower = yield Reduction(op.InnerProducts(from_base))
    count = math.isqrt(2 * len(lower))
    products = np.zeros((count, count))
    rows, columns = np.tril_indices(count)
    products[rows, columns] = products[columns, rows] = lower
    return products


def largest(
    info: TensorInfo, quantities: op.Quantities, counts: Counts, group: str | None = None, sampled: bool = True
) -> Gathering[list[list[op.Cut]]]:
    """Find the k largest of several quantities at once, each for one k or more.

    Args:
        info: the tensor.
        quantities: (block, index of its first element) to non-negative float32 tensors of its shape.
        counts: (number of the quantity, its elements, those that aren't zero) to the values of k.
        group: count over all tensors of this group instead of the tensor alone; indices are then the model's.
        sampled: whether the quantities can be had of elements picked from anywhere, so that a sample may be tried.

    Returns:
        For each quantity a cut for each k.
    """
    where = _Where(quantities, group, *((info.offset, info.extent) if group is not None else (0, info.numel)))
    searches: _Searches | None = None
    if sampled and (group is not None or info.numel >= WORTH_SAMPLING):
        guesses = yield from _by_bits(where, _around(counts), sampled=True)
        searches = yield from _proven(where, counts, guesses)
    if searches is None:
        searches = yield from _by_bits(where, counts)

    # Ties that have to be split: one pass for all of them at once, then each within its own bucket of indices,
    # until the bucket is a single element.
    tied = [search for of_quantity in searches for search in of_quantity if search.is_tied]
    unplaced = [search for search in tied if search.width == 0]
    if unplaced:
        for search in unplaced:
            search.width = where.extent
        yield from _narrow(unplaced, where)
    for search in tied:
        while search.width > 1:
            yield from _narrow([search], where)
        search.end = search.begin + 1
    return [[op.Cut(search.threshold, search.end) for search in of_quantity] for of_quantity in searches]


@dataclass(frozen=True)
class _Where:
    """What is counted, over one tensor or a group of them.

    Attributes:
        quantities: of which the largest are looked for.
        group: of the reductions.
        origin: index of the tensor's first element among all that are counted.
        extent: how many indices there are.
    """

    quantities: op.Quantities
    group: str | None
    origin: int
    extent: int

    def reduction(self, of: op.Statistic, within: tuple[int, int] | None = None, sampled: bool = False) -> Reduction:
        return Reduction(of, self.group, within, sampled)


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
    end: int = op.NO_END

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
        self.wanted = wanted - int(from_top[place]) + self.equal  # less those in the bins above
        self.bits = first + bin

    def ascend(self, counts: Totals, step: int) -> None:
        """Take the bucket of indices in which the last wanted one lies; the last where the threshold is NaN."""
        up_to = counts.cumsum()
        bucket = min(int(np.searchsorted(up_to, self.wanted)), len(counts) - 1)
        self.wanted -= int(up_to[bucket] - counts[bucket])  # those in the buckets before
        self.begin += bucket * step
        self.width = step


_Searches: TypeAlias = list[list[_Search]]  # for each quantity one for each k


def _by_bits(where: _Where, counts: Counts, sampled: bool = False) -> Gathering[_Searches]:
    """Find the thresholds by counting bit patterns: for each quantity a search for each k that is wanted."""
    # the upper 16 bits: which bin the k-th largest is in
    upper = yield where.reduction(op.CountUpperBits(where.quantities), sampled=sampled)
    elements = int(upper[0].sum())
    searches = [
        [_Search(number, k) for k in counts(number, elements, int(histogram[1:].sum()))]
        for number, histogram in enumerate(upper)
    ]
    active = [search for of_quantity in searches for search in of_quantity if search.wanted > 0]
    for search in active:
        search.descend(upper[search.number], first=0)

    # the lower 16 bits within that bin; zeros had a bin of their own, and need none
    if inner := [search for search in active if search.bits > 0]:
        for search in inner:
            search.bits = ((search.bits - 1) << 16) + 1  # the first pattern of the bin: zero took the first one
        bins = tuple(dict.fromkeys((search.number, search.bits) for search in inner))
        histograms = yield where.reduction(op.CountLowerBits(where.quantities, bins), sampled=sampled)
        lower = dict(zip(bins, histograms, strict=True))
        for search in inner:
            search.descend(lower[search.number, search.bits], first=search.bits)
    return searches


def _around(counts: Counts) -> Counts:
    """Return counts for a sample: each k, and as far off as it may be, so that one threshold is mostly the whole's."""

    def widened(number: int, elements: int, positive: int) -> list[int]:
        ks = []
        for k in counts(number, elements, positive):
            margin = 1 + int(DEVIATIONS * math.sqrt(k * (elements - k) / max(1, elements)))
            ks += [min(max(1, k + off), elements) for off in (0, -margin, margin)]
        return ks

    return widened


def _proven(where: _Where, counts: Counts, guesses: _Searches) -> Gathering[_Searches | None]:
    """Find the searches for the whole among a sample's thresholds, by one pass of comparisons.

    Returns:
        As ``_by_bits``; None where for some k none of the thresholds is that of the whole.
    """
    # each different threshold of a quantity once, the lowest first
    candidates = [sorted({guess.bits: guess for guess in of_quantity}.items()) for of_quantity in guesses]
    thresholds = tuple(tuple(guess.threshold for _, guess in of_quantity) for of_quantity in candidates)
    # one pass: what is above each threshold, and what equals it in each bucket of indices
    step = -(-where.extent // op.BUCKETS)
    totals = yield where.reduction(op.CompareSizes(where.quantities, thresholds, where.origin, step))
    searches: _Searches = []
    for number, (of_quantity, compared) in enumerate(zip(candidates, totals, strict=True)):
        elements, positive = int(compared[0, 0]), int(compared[0, 1])  # the same for every threshold
        bits = [pattern for pattern, _ in of_quantity]
        fitting = [_fitting(number, k, bits, compared, step) for k in counts(number, elements, positive)]
        if None in fitting:
            return None
        searches.append([search for search in fitting if search is not None])
    return searches


def _fitting(number: int, k: int, bits: Sequence[int], compared: Totals, step: int) -> _Search | None:
    """Return the search for the k largest, done but for ties, at the threshold that is theirs; None where none is.

    ``bits`` are the bit patterns of the thresholds, ``compared`` is what ``CompareSizes`` counts for each.
    """
    if k == 0:
        return _Search(number, 0)
    for pattern, counted in zip(bits, compared, strict=False):
        above, equal = int(counted[2]), counted[3:]
        search = _Search(number, k - above, pattern, equal=int(equal.sum()))
        # The k-th largest equals the threshold: fewer than k are above it, and with those that equal it there are k.
        if 0 < search.wanted <= search.equal:
            if search.is_tied:
                search.ascend(equal, step)
            return search
    return None


def _narrow(searches: list[_Search], where: _Where) -> Gathering[None]:
    """Narrow the ranges of indices, which must be the same in all the searches, to one bucket each."""
    begin, width = searches[0].begin, searches[0].width
    step = -(-width // op.BUCKETS)
    equals = tuple((search.number, search.threshold) for search in searches)
    # no other element needs to be visited
    within = (max(begin - where.origin, 0), max(begin + width - where.origin, 0))
    counts = yield where.reduction(op.CountEqual(where.quantities, equals, where.origin, begin, width, step), within)
    for search, of_search in zip(searches, counts, strict=True):
        search.ascend(of_search, step)
