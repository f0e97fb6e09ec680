"""The operations that merge methods name: what is to be done to the blocks of a tensor, as plain data.

A block is the inputs of a merge, the base's elements first where there is one. Some operations merge a block, others
give a few figures of it that are additive over blocks. Who does them, and how, is the matter of a backend
(``torch_ops``, ``c_ops``). A method that needs something else writes it as a function of torch tensors instead, which
stands wherever an operation may: (block, index of its first element) to the merged block, or to the figures.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from mergekit_lite.deferred import np, torch

Numeric = TypeVar("Numeric", float, "torch.Tensor")
Block: TypeAlias = list["torch.Tensor"]  # all of one shape and dtype
BlockFunction: TypeAlias = Callable[[Block, int], "torch.Tensor"]

UPPER = (1 << 15) + 1  # bins of the upper bits: the first one is for zero alone, so that the rest counts the others
LOWER = 1 << 16  # bins of the lower bits
BUCKETS = 1 << 12  # of indices
NO_END = sys.maxsize  # an index beyond every element


@dataclass(frozen=True)
class TensorKind:
    """What a backend has to know of the tensor it works on: its inputs and output.

    Attributes:
        dtypes: of the inputs, and of the output where there is one.
        elements: how many it has.
        row: the length of the rows that blocks don't split and functions of methods see; 0 where blocks are 1-D.
        rounding_key: of the draws for stochastic rounding (``draws.stream_key``); None rounds to nearest.
    """

    dtypes: tuple[str, ...]
    elements: int = 0
    row: int = 0
    rounding_key: int | None = None


# --- masks: what is kept of a model's delta -------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """The k largest: those above ``threshold``, and of those equal to it the ones whose index is below ``end``."""

    threshold: float
    end: int

    def mask(self, quantity: torch.Tensor, start: int) -> torch.Tensor:
        """Return 1.0 for the k largest of a block, 0.0 for the others: float32 of its shape.

        ``start`` is the index of its first element.
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
        """Return a block, float32 or float64, with all but its elements of the k largest magnitudes zeroed.

        ``start`` is the index of its first element.
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
        """Return how many of the block's elements, from the first one on, are kept when equal to the threshold."""
        return min(max(self.end - start, 0), block.numel())


@dataclass(frozen=True)
class BySize:
    """Keep the elements of ``largest``, without those of ``outliers``; indices count from the tensor's begin."""

    largest: Cut
    outliers: Cut | None = None


@dataclass(frozen=True)
class ByChance:
    """Keep each element with the probability ``share``, by the draws of ``key`` (``draws.halves``)."""

    key: int
    share: float


@dataclass(frozen=True)
class ByRank:
    """Keep an element with a probability that rises with the rank of its size in its row, by the draws of ``key``.

    Attributes:
        key: of the draws.
        share: the mean probability.
        reach: how far the probability goes below and above it.
        divide: divide what is kept by its probability.
        columns: length of a row; blocks are whole rows.
    """

    key: int
    share: float
    reach: float
    divide: bool
    columns: int


Mask: TypeAlias = BySize | ByChance | ByRank | None  # None keeps everything
Masks: TypeAlias = tuple[Mask, ...]  # one for each model


# --- operations that merge a block ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cast:
    """The block's first tensor, in the output's dtype."""


@dataclass(frozen=True)
class WeightedSum:
    """(Σ coefficient·tensor) / divisor; from a base: base + (Σ coefficient·what is kept of tensor − base) / divisor.

    Products are rounded before they are added, so that every device and every backend comes to the same.

    Attributes:
        coefficients: one for each tensor, without the base.
        from_base: whether the first tensor is a base.
        divisor: 1 divides by nothing.
        masks: what is kept of each delta; empty for everything.
        order: which of the block's tensors take part, the base first; empty for all as they come.
    """

    coefficients: tuple[float, ...]
    from_base: bool = False
    divisor: float = 1.0
    masks: Masks = ()
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Election:
    """Let vote·delta elect a sign for each element, and add to the base what has it.

        base + scale·Σ share·vote·δ·[sign elected]   (divided by Σ weight·[sign elected] where there are weights)

    Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv 2306.01708: per element, the sign of the sum wins, and what has
    the other sign is dropped. A sum of zero elects +, a zero has no sign and is always dropped, as in mergekit.

    Attributes:
        votes, shares: a number for each model.
        weights: the same, or None. Where those that agree sum to zero nothing is divided.
        scale: of what is added.
        kept: what is kept of each delta: masks (empty for everything), or a function of (block, index of its first
            element) that gives the sparse deltas as new tensors.
    """

    votes: tuple[float, ...]
    shares: tuple[float, ...]
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    kept: Masks | Callable[[Block, int], Block] = ()


# --- operations that give figures of a block ------------------------------------------------------------------------


@dataclass(frozen=True)
class AllFinite:
    """1 where the block's one tensor holds neither NaN nor infinity, else 0."""


@dataclass(frozen=True)
class InnerProducts:
    """The inner products of the tensors, or of their deltas: float64, the lower triangle row by row."""

    from_base: bool


@dataclass(frozen=True)
class Step:
    """⟨out − x, x − base⟩ and ⟨x − base, x − base⟩ of a block of out, base and x: how far a merge went on from x."""


@dataclass(frozen=True)
class Lengths:
    """Σ|δ| of each model, then of what is kept of each: float64 of shape (2·models,)."""

    masks: Masks


@dataclass(frozen=True)
class Sizes:
    """Σ|δ| (or Σδ² where ``squared``) of each model, then the number of elements; each times ``factor``: float64."""

    squared: bool
    factor: float = 1.0


@dataclass(frozen=True)
class DeltaSizes:
    """|model − base| of some models, as float32: quantities of which the k largest are looked for."""

    models: tuple[int, ...]

    def __call__(self, block: Block, _: int) -> Block:
        """Return the sizes of one block."""
        return [(block[model + 1] - block[0]).abs_().float() for model in self.models]


# Non-negative float32 tensors of the tensor's shape: (block, index of its first element) to one block of each.
Quantities: TypeAlias = DeltaSizes | Callable[[Block, int], Sequence["torch.Tensor"]]


@dataclass(frozen=True)
class CountUpperBits:
    """How many elements of each quantity have each pattern of the upper 16 bits: int64 of shape (quantities, UPPER)."""

    quantities: Quantities


@dataclass(frozen=True)
class CountLowerBits:
    """How many elements have each of the ``LOWER`` bit patterns from one on: int64 of shape (bins, LOWER).

    ``bins`` are (number of the quantity, first bit pattern).
    """

    quantities: Quantities
    bins: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CompareSizes:
    """Compare each quantity with some thresholds: int64 of shape (quantities, most thresholds, 3 + BUCKETS).

    For each threshold the elements, those above zero, those above the threshold, and those equal to it in each bucket
    of ``step`` indices. ``origin`` is the index of the tensor's first element there.
    """

    quantities: Quantities
    thresholds: tuple[tuple[float, ...], ...]
    origin: int
    step: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the result."""
        return len(self.thresholds), max(map(len, self.thresholds)), 3 + BUCKETS


@dataclass(frozen=True)
class CountEqual:
    """Count what equals a threshold, among the indices ``begin … begin + width``: int64 of shape (equals, BUCKETS).

    ``equals`` are (number of the quantity, threshold); ``origin`` and ``step`` as in ``CompareSizes``, buckets from
    ``begin`` on.
    """

    quantities: Quantities
    equals: tuple[tuple[int, float], ...]
    origin: int
    begin: int
    width: int
    step: int


MergeOperation: TypeAlias = Cast | WeightedSum | Election
Figures: TypeAlias = (
    AllFinite | InnerProducts | Step | Lengths | Sizes | CountUpperBits | CountLowerBits | CompareSizes | CountEqual
)
Merge: TypeAlias = MergeOperation | BlockFunction  # what gives a merged block
Statistic: TypeAlias = Figures | BlockFunction  # what gives figures: a small tensor, float64 or int64


@dataclass(frozen=True)
class Observed:
    """Figures of a merged block: of some grains of it, each followed by those of its inputs."""

    figures: Figures
    grains: Sequence[slice]


NOTHING = Observed(AllFinite(), ())


def draw_limit(probability: Numeric) -> Numeric:
    """Return what a 16-bit draw is below with this probability, to the nearest of 65,536 steps."""
    return (probability - 0.5) * 65536 - 0.5


def _below(threshold: float) -> float:
    """Return the float32 before a threshold: what ``hardshrink`` zeroes so that the threshold itself is kept."""
    return float(np.nextafter(np.float32(threshold), np.float32(-math.inf)))
