"""Statistics built from sums: inner products, and the exact threshold of the k largest without a sort.

The bit pattern of a non-negative float32, read as an integer, orders like the value. So one pass counts the upper 16
bits, which tells the bin of the k-th largest, and a second one the lower 16 bits within that bin: the threshold is
exact, for any number of elements, with a fixed amount of memory. Where only some of the elements equal to the threshold
are among the k, those with the lowest index are. A third pass counts them in buckets of indices; the ones after it
visit nothing but the bucket that holds the last of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from mergekit_lite.methods.passes import Block, Sums

UPPER = (1 << 15) + 1  # bins of the upper bits: the first one is for zero alone, so that the rest counts the others
LOWER = 1 << 16
BUCKETS = 1 << 12
ALL = sys.maxsize  # an index beyond every element

Quantities = Callable[[Block, int], Sequence[torch.Tensor]]  # (block, index of its first element)


def gram(vectors: Callable[[Block], Block]) -> Generator[Sums, torch.Tensor, torch.Tensor]:
    """Inner products of the n vectors that ``vectors`` makes from a block's inputs.

    Returns:
        float64 (n, n) on the CPU.
    """

    def of(block: Block, _: int) -> torch.Tensor:
        wide = [vector.flatten().double() for vector in vectors(block)]
        return torch.stack([torch.dot(a, b) for i, a in enumerate(wide) for b in wide[: i + 1]])

    lower = (yield Sums(of)).cpu()
    count = math.isqrt(2 * len(lower))
    products = torch.zeros(count, count, dtype=torch.float64)
    rows, columns = torch.tril_indices(count, count)
    products[rows, columns] = lower
    products[columns, rows] = lower
    return products


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
        equal = min(max(self.end - start, 0), quantity.numel())
        if equal == quantity.numel():
            return torch.ge(quantity, self.threshold, out=mask)
        torch.gt(quantity, self.threshold, out=mask)
        if equal:
            torch.ge(quantity.view(-1)[:equal], self.threshold, out=mask.view(-1)[:equal])
        return mask


def largest(
    quantities: Quantities,
    counts: Callable[[int, int, int], Sequence[int]],
    origin: int = 0,
    group: str | None = None,
) -> Generator[Sums, torch.Tensor, list[list[Cut]]]:
    """Find the k largest of several quantities at once, each for one k or more.

    Args:
        quantities: (block, index of its first element) to non-negative float32 tensors of its shape.
        counts: (number of the quantity, its elements, those that aren't zero) to the values of k.
        origin: the place of the tensor's first element, from which indices count.
        group: count over all tensors of this group instead of the tensor alone.

    Returns:
        For each quantity a cut for each k.
    """
    upper = (yield Sums(lambda block, start: torch.stack([_upper(q) for q in quantities(block, start)]), group)).cpu()
    elements = int(upper[0].sum())
    ks = [counts(number, elements, int(row[1:].sum())) for number, row in enumerate(upper)]
    searches = [_Search(number, k) for number, row in enumerate(ks) for k in row]
    active = [search for search in searches if search.wanted > 0]
    for search in active:
        search.descend(upper[search.number], first=0)

    # within the bin; zeros have theirs for themselves
    if inner := [search for search in active if search.bits > 0]:
        for search in inner:
            search.bits = ((search.bits - 1) << 16) + 1

        def within_bins(block: Block, start: int) -> torch.Tensor:
            made = quantities(block, start)
            return torch.stack([_lower(made[search.number], search.bits) for search in inner])

        for search, row in zip(inner, (yield Sums(within_bins, group)).cpu(), strict=True):
            search.descend(row, first=search.bits)

    # ties that have to be split: first for all at once, then each within its bucket
    tied = [search for search in active if search.wanted < search.equal]
    if tied:
        for search in tied:
            search.width = elements
        yield from _narrow(tied, quantities, origin, group)
        for search in tied:
            while search.width > 1:
                yield from _narrow([search], quantities, origin, group)
            search.end = search.begin + 1

    cuts = iter([Cut(search.threshold, search.end) for search in searches])
    return [[next(cuts) for _ in row] for row in ks]


@dataclass
class _Search:
    """The search for one cut: the ``wanted`` largest of what is left.

    ``bits`` is what is known of the threshold's bit pattern, ``equal`` the number of elements that share it, and
    ``begin``, ``width`` the range of indices in which the last wanted one of them lies.
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
        return torch.tensor(self.bits, dtype=torch.int32).view(torch.float32).item()

    def descend(self, histogram: torch.Tensor, first: int) -> None:
        """Take the bin of the k-th largest, of those whose counts are given from the bits ``first`` on."""
        from_top = histogram.flip(0).cumsum(0)
        wanted = min(self.wanted, int(from_top[-1]))
        place = int(torch.searchsorted(from_top, wanted))
        bin = len(histogram) - 1 - place
        self.equal = int(histogram[bin])
        self.wanted = wanted - int(from_top[place]) + self.equal
        self.bits = first + bin

    def ascend(self, counts: torch.Tensor, step: int) -> None:
        """Take the bucket of indices in which the last wanted one lies."""
        up_to = counts.cumsum(0)
        bucket = int(torch.searchsorted(up_to, self.wanted))
        self.wanted -= int(up_to[bucket] - counts[bucket])
        self.begin += bucket * step
        self.width = step


def _narrow(
    searches: list[_Search], quantities: Quantities, origin: int, group: str | None
) -> Generator[Sums, torch.Tensor, None]:
    """Narrow the ranges of indices, which must be the same in all the searches, to one bucket each."""
    begin, width = searches[0].begin, searches[0].width
    step = -(-width // BUCKETS)

    def in_buckets(block: Block, start: int) -> torch.Tensor:
        made = quantities(block, start)
        counts = torch.zeros(len(searches), BUCKETS, dtype=torch.int64, device=block[0].device)
        first = max(begin, origin + start)
        stop = min(begin + width, origin + start + made[0].numel())
        if first >= stop:
            return counts
        lead = (first - begin) % step
        tail = -(stop - begin) % step
        bucket = (first - begin) // step
        for row, search in zip(counts, searches, strict=True):
            part = made[search.number].flatten()[first - origin - start : stop - origin - start]
            equal = torch.eq(part, search.threshold, out=torch.empty_like(part))
            inside = pad(equal, (lead, tail)).view(-1, step).sum(1)
            row[bucket : bucket + len(inside)] = inside.long()
        return counts

    within = (max(begin - origin, 0), max(begin + width - origin, 0))
    for search, row in zip(searches, (yield Sums(in_buckets, group, within)).cpu(), strict=True):
        search.ascend(row, step)


def _upper(quantity: torch.Tensor) -> torch.Tensor:
    """Histogram of the upper 16 bits. Taking 1 off first gives zero, and nothing else, the first bin."""
    bits = quantity.view(torch.int32).flatten()
    return torch.bincount(((bits - 1) >> 16).add_(1), minlength=UPPER)


def _lower(quantity: torch.Tensor, first: int) -> torch.Tensor:
    """Histogram of the 2¹⁶ bit patterns from ``first`` on; all others fall into two bins that are cut off."""
    bits = quantity.view(torch.int32).flatten() - first
    return torch.bincount(bits.clamp_(-1, LOWER).add_(1), minlength=LOWER + 2)[1:-1]
