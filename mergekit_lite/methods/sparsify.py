"""Sparsifiers: which elements of the models' deltas are kept, and how the rest makes up for what is lost.

Each gathers the statistics it needs, if any, and returns a mask for each model. A density of 1 keeps everything, 0
nothing.

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

from typing import Literal, TypeAlias

from mergekit_lite import draws
from mergekit_lite.methods.contract import Gathering, Reduction, TensorInfo
from mergekit_lite.methods.parameters import PerModel
from mergekit_lite.methods.registry import last_axis
from mergekit_lite.methods.statistics import Counts, largest
from mergekit_lite.ops.operations import ByChance, ByRank, BySize, Cut, DeltaSizes, Lengths, Mask, Masks

Sparsifier: TypeAlias = Gathering[Masks]
Rescale = Literal["l1", "density", True, False]  # True is "l1"
Trim = Literal["tensor", "global"]

FIRST_STREAM = 1  # stream 0 of a tensor's draws is stochastic rounding's


def magnitude(info: TensorInfo, density: PerModel[float], trim: Trim) -> Sparsifier:
    """Keep the largest elements of each delta: of this tensor's, or (``trim`` global) of the whole model's."""

    def counts(model: int, elements: int, _: int) -> list[int]:
        return [max(1, int(density[model] * elements)) if density[model] > 0 else 0]

    return (yield from _by_size(info, density, counts, trim, f"magnitude {density}"))


def inliers(info: TensorInfo, density: PerModel[float], gamma: PerModel[float], trim: Trim) -> Sparsifier:
    """Keep the largest elements but the very largest ones. Where there are too few, the smallest are kept."""

    def counts(model: int, elements: int, _: int) -> list[int]:
        kept, outliers = int(density[model] * elements), int(gamma[model] * elements)
        small = max(0, elements - kept - outliers)
        return [elements - small, elements - small - kept]

    return (yield from _by_size(info, density, counts, trim, f"inliers {density} {gamma}"))


def _by_size(info: TensorInfo, density: PerModel[float], counts: Counts, trim: Trim, group: str) -> Sparsifier:
    """Keep the k largest of each delta, without the largest of a second k where there is one."""
    trimmed = tuple(model for model in range(info.models) if density[model] < 1)
    if not trimmed:
        return ()
    origin = info.offset if trim == "global" else 0
    cuts = yield from largest(
        info,
        DeltaSizes(trimmed),
        lambda number, elements, positive: counts(trimmed[number], elements, positive),
        group if trim == "global" else None,
    )
    masks: list[Mask] = [None] * info.models
    for model, of_model in zip(trimmed, cuts, strict=True):
        masks[model] = BySize(*(Cut(cut.threshold, cut.end - origin) for cut in of_model))
    return tuple(masks)


def chance(info: TensorInfo, density: PerModel[float]) -> Masks:
    """Keep each element with the probability ``density``."""
    return tuple(ByChance(key, share) if share < 1 else None for key, share in zip(_keys(info), density, strict=True))


def ranked_chance(info: TensorInfo, density: PerModel[float], epsilon: PerModel[float], divide: bool) -> Masks:
    """Keep each element with a probability that rises with the rank of its size in its row, see ``ByRank``.

    The blocks of the tensor have to come as whole rows.
    """
    columns = last_axis(info.shape)
    return tuple(
        ByRank(key, share, reach, divide, columns) if share < 1 else None
        for key, share, reach in zip(_keys(info), density, epsilon, strict=True)
    )


def rescaling(masks: Masks, density: PerModel[float], rescale: Rescale) -> Gathering[PerModel[float]]:
    """Find the factor for what is kept of each delta that makes up for what was dropped.

    ``rescale`` is ``l1`` (or True): to the sum of magnitudes that the whole delta of this tensor had, as in mergekit;
    ``density``: by 1/density, as in DARE; or False: not at all.
    """
    if rescale is False or min(density) >= 1:
        return (1.0,) * len(density)
    if rescale == "density":
        return tuple(1 / share if share > 0 else 1.0 for share in density)
    before, after = (yield Reduction(Lengths(masks))).reshape(2, -1).tolist()
    return tuple(a / b if b > 0 else 1.0 for a, b in zip(before, after, strict=True))


def _keys(info: TensorInfo) -> list[int]:
    """Return the keys of each model's draws."""
    return [draws.stream_key(info.seed, info.name, FIRST_STREAM + model) for model in range(info.models)]
