"""Sparsifiers: which elements of the models' deltas are kept, and how the rest makes up for what is lost.

Each gathers the statistics it needs, if any, and returns a function of a block that gives the sparse deltas. A density
of 1 keeps everything, 0 nothing.

- ``magnitude`` (TIES, Yadav et al. 2023): the ⌊density·elements⌋ largest (mergekit: at least one).
- ``inliers`` (Model Breadcrumbs, Davari & Belilovsky, ECCV 2024, arXiv 2312.06795): without the ⌊gamma·elements⌋
  largest, then the ⌊density·elements⌋ largest.
- ``chance`` (DARE, Yu et al., ICML 2024, arXiv 2311.03099): each with the probability ``density``.
- ``ranked_chance`` (DELLA, Deep et al. 2024, arXiv 2406.11617): with a probability that rises with the rank of its
  magnitude in its row, from density − epsilon to density + epsilon. Magnitudes are ranked to 7 significant bits, equal
  ones share their mean rank: the rank is then a matter of counting, and the mean of the row stays exact.

Where the k largest are kept, magnitudes are compared as float32; of equal ones the lowest index is the largest. Draws
depend on the seed, the tensor's name, the model and the element alone; they have 16 bits, so probabilities are met to
the nearest of 65,536 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from mergekit_lite import draws
from mergekit_lite.deferred import np, torch
from mergekit_lite.methods.passes import Block, Reduction, TensorInfo, Totals, deltas
from mergekit_lite.methods.statistics import Cut, largest, total
from mergekit_lite.ops import c_ops
from mergekit_lite.ops.c_ops import BY_CHANCE, BY_RANK, BY_SIZE, Keep


@dataclass(frozen=True)
class Sparse:
    """Which elements of the deltas are kept.

    Attributes:
        of: (deltas, index of their first element) to the sparse ones, maybe in place.
        keeps: the same for c_ops, one for each model; None where they can't tell.
        row: the length of the rows that blocks don't split, where that matters.
    """

    of: Callable[[Block, int], Block]
    keeps: tuple[Keep, ...] | None = None
    row: int = 0

    def __call__(self, made: Block, start: int) -> Block:
        """The sparse ones."""
        return self.of(made, start)


Sparsifier: TypeAlias = "Generator[Reduction, Totals, Sparse]"
Rescale = Literal["l1", "density", True, False]  # True is "l1"
Trim = Literal["tensor", "global"]

T = TypeVar("T", float, "torch.Tensor")
LEVELS = 1025  # of magnitude, by which DELLA ranks
FIRST_STREAM = 1  # stream 0 of a tensor's draws is stochastic rounding's


def whole(info: TensorInfo) -> Sparse:
    """Keep everything."""
    return Sparse(lambda made, _: made, (Keep(),) * info.models)


def magnitude(info: TensorInfo, density: tuple[float, ...], trim: Trim) -> Sparsifier:
    """Keep the largest elements of each delta: of this tensor's, or (``trim`` global) of the whole model's."""

    def counts(model: int, elements: int, _: int) -> list[int]:
        return [max(1, int(density[model] * elements)) if density[model] > 0 else 0]

    return (yield from _by_size(info, density, counts, trim, f"magnitude {density}"))


def inliers(info: TensorInfo, density: tuple[float, ...], gamma: tuple[float, ...], trim: Trim) -> Sparsifier:
    """Keep the largest elements but the very largest ones. Where there are too few, the smallest are kept."""

    def counts(model: int, elements: int, _: int) -> list[int]:
        kept, outliers = int(density[model] * elements), int(gamma[model] * elements)
        small = max(0, elements - kept - outliers)
        return [elements - small, elements - small - kept]

    return (yield from _by_size(info, density, counts, trim, f"inliers {density} {gamma}"))


def _by_size(
    info: TensorInfo,
    density: tuple[float, ...],
    counts: Callable[[int, int, int], list[int]],
    trim: Trim,
    group: str,
) -> Sparsifier:
    """Keep the k largest of each delta, without the largest of a second k where there is one."""
    trimmed = [model for model in range(info.models) if density[model] < 1]
    if not trimmed:
        return whole(info)
    origin = info.offset if trim == "global" else 0
    cuts = yield from largest(
        info,
        lambda block, _: [(block[model + 1] - block[0]).abs_().float() for model in trimmed],
        lambda number, elements, other: counts(trimmed[number], elements, other),
        group if trim == "global" else None,
        of_models=trimmed,
    )
    keeps = [Keep()] * info.models
    for model, (cut, *without) in zip(trimmed, cuts, strict=True):
        high = without[0] if without else Cut(math.inf, 0)
        keeps[model] = Keep(
            BY_SIZE,
            low=cut.threshold,
            low_end=cut.end - origin,
            high=high.threshold,
            high_end=high.end - origin,
        )

    def sparse(made: Block, start: int) -> Block:
        for model, (cut, *without) in zip(trimmed, cuts, strict=True):
            kept = cut.largest(made[model], origin + start)
            for outliers in without:
                kept.sub_(outliers.largest(made[model], origin + start))
            made[model] = kept
        return made

    return Sparse(sparse, tuple(keeps))


def chance(info: TensorInfo, density: tuple[float, ...]) -> Sparse:
    """Keep each element with the probability ``density``."""
    keys = [draws.stream_key(info.seed, info.name, FIRST_STREAM + model) for model in range(info.models)]

    def sparse(made: Block, start: int) -> Block:
        for delta, key, share in zip(made, keys, density, strict=True):
            if share < 1:
                delta.mul_(_draws(key, start, delta).lt_(_limit(share)))
        return made

    keeps = [
        Keep(BY_CHANCE, key=key, limit=_limit(share)) if share < 1 else Keep()
        for key, share in zip(keys, density, strict=True)
    ]
    return Sparse(sparse, _told(info, keeps))


def ranked_chance(info: TensorInfo, density: tuple[float, ...], epsilon: tuple[float, ...], divide: bool) -> Sparse:
    """Keep each element with a probability that rises with the rank of its size in its row.

    Args:
        info: the tensor; its blocks come as whole rows.
        density: mean probability, for each model.
        epsilon: how far the probability goes below and above it, for each model.
        divide: divide what is kept by its probability, as in the paper.
    """
    keys = [draws.stream_key(info.seed, info.name, FIRST_STREAM + model) for model in range(info.models)]

    def sparse(made: Block, start: int) -> Block:
        for delta, key, share, reach in zip(made, keys, density, epsilon, strict=True):
            if share < 1:
                chances = _chances(_levels(delta), share - reach, share + reach)
                mask = _draws(key, start, delta).lt_(_limit(chances))
                delta.mul_(mask.div_(chances) if divide else mask)
        return made

    columns = info.shape[-1] if info.shape else 1
    keeps = []
    for key, share, reach in zip(keys, density, epsilon, strict=True):
        if share < 1:
            lowest, half_step = (share - reach, reach / (columns - 1)) if columns > 1 else (share, 0.0)
            keeps.append(Keep(BY_RANK, key=key, lowest=lowest, half_step=half_step, divide=divide))
        else:
            keeps.append(Keep())
    return Sparse(sparse, _told(info, keeps), columns)


def rescaling(
    sparse: Sparse, density: tuple[float, ...], rescale: Rescale
) -> Generator[Reduction, Totals, tuple[float, ...]]:
    """Find the factor for what is kept of each delta that makes up for what was dropped.

    Args:
        sparse: what gives the sparse deltas.
        density: the share that is kept, for each model.
        rescale: ``l1`` (or True): to the sum of magnitudes that the whole delta of this tensor had, as in mergekit;
            ``density``: by 1/density, as in DARE; False: not at all.
    """
    if rescale is False or min(density) >= 1:
        return (1.0,) * len(density)
    if rescale == "density":
        return tuple(1 / share if share > 0 else 1.0 for share in density)

    def lengths(block: Block, start: int) -> torch.Tensor:
        sizes = [delta.abs_() for delta in deltas(block)]
        before = [total(size) for size in sizes]
        return torch.stack([*before, *(total(size) for size in sparse(sizes, start))]).view(2, -1)

    def kernel(block: Sequence[c_ops.Run], start: int) -> Totals:
        assert sparse.keeps is not None
        return np.array(c_ops.lengths(block, sparse.keeps, start, sparse.row)).reshape(2, -1)

    before, after = (yield Reduction(lengths, kernel=kernel if sparse.keeps is not None else None)).tolist()
    return tuple(a / b if b > 0 else 1.0 for a, b in zip(before, after, strict=True))


def _told(info: TensorInfo, keeps: list[Keep]) -> tuple[Keep, ...] | None:
    """What a kernel is told where elements are drawn: none is beyond those that one key serves."""
    return tuple(keeps) if info.numel <= 2 * draws.WORDS else None


def _draws(key: int, start: int, like: torch.Tensor) -> torch.Tensor:
    """A draw for each element of a block, uniform over the 16-bit integers, of the block's shape and dtype."""
    return draws.halves(key, start, like.numel(), like.device).to(like.dtype).view(like.shape)


def _limit(probability: T) -> T:
    """What a draw is below with this probability, to the nearest of 65,536 steps."""
    return (probability - 0.5) * 65536 - 0.5


def _levels(delta: torch.Tensor) -> torch.Tensor:
    """The magnitudes of each row to 7 significant bits, as whole numbers from 0 to ``LEVELS`` − 1 (the row's largest).

    There are 64 levels to a factor of two, down to 2⁻¹⁶ of the largest; what is smaller still has level 0.
    """
    coarse = delta.abs().float().view(torch.int32) >> 17
    return coarse.sub_(coarse.amax(1, keepdim=True) - (LEVELS - 1)).clamp_(min=0)


def _chances(levels: torch.Tensor, lowest: float, highest: float) -> torch.Tensor:
    """Probabilities that rise with the rank of the level in its row: float32 of the same shape.

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
    places = levels + torch.arange(0, rows * LEVELS, LEVELS, dtype=torch.int32, device=levels.device)[:, None]
    counts = torch.bincount(places.view(-1), minlength=rows * LEVELS).view(rows, LEVELS)
    ranks = counts.cumsum(1).mul_(2).sub_(counts).sub_(1)  # twice the mean rank
    return ranks.mul(0.5 * step).add_(lowest).float().view(-1).index_select(0, places.view(-1)).view(levels.shape)
