"""What is looked at in the deltas of one tensor: sums over every element, and more of a sample.

Of every element: inner products of the deltas (float64), how many changed, how many changed in two models at once and
with which signs. Of the sample: which elements are among the k largest, what rounding makes of an extrapolation, the
deltas' sizes by powers of two, SCE's coefficients where it selects, and the stable rank ‖Δ‖²_F / ‖Δ‖²₂.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from mergekit_lite import dtypes
from mergekit_lite.comparison.survey import Numbers, Reduction
from mergekit_lite.deferred import torch
from mergekit_lite.errors import UsageError
from mergekit_lite.methods import sce
from mergekit_lite.methods.contract import Block, TensorInfo, Totals, WithCoefficients, answered
from mergekit_lite.methods.contract import Reduction as Request
from mergekit_lite.methods.statistics import largest
from mergekit_lite.ops.torch_ops import figures_of
from mergekit_lite.vectors.matching import Match

Answer = TypeVar("Answer")

SMALLEST, BINS = -44, 48  # the sizes' bins: |δ| from 2⁻⁴⁴ on, each twice the last; smaller and larger go to the ends
FLOAT32_BIAS, FLOAT32_FRACTION = 127, 23
POWER_STEPS, POWER_VECTORS = 12, 4
PAIRED = ("products", "signs", "both")
EXACT_RANK = 64  # rows or columns up to which the largest singular value is computed, not iterated


@dataclass(frozen=True)
class Settings:
    """What can be chosen.

    Attributes:
        top_k: share of the elements in a mask of the largest changes.
        alphas, dtypes: of the extrapolations whose effective alpha is told.
        select_topk: SCE's.
    """

    top_k: float = 0.2
    alphas: tuple[float, ...] = (0.1, 0.3, 0.5)
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    select_topk: float = 1.0

    def __post_init__(self) -> None:
        """Raise UsageError where a number is out of bounds."""
        if not 0 < self.top_k <= 1:
            raise UsageError(f"top-k: expected a share above 0 and up to 1, got {self.top_k:g}.")
        if not 0 < self.select_topk <= 1:
            raise UsageError(f"select-topk: expected a share above 0 and up to 1, got {self.select_topk:g}.")
        if not all(math.isfinite(alpha) for alpha in self.alphas):
            raise UsageError("An alpha has to be a finite number.")


class Shapes:
    """The sums by name, each additive over tensors, and where each lies in a row of numbers.

    products (n, n): ⟨δᵢ, δⱼ⟩. means (n,): ⟨δᵢ, δᵢ⟩ / elements, added up over tensors.
    both (n, n): elements changed in both. signs (n, n): those of one sign less those of opposite signs.
    touched, split: elements that any model changed, and those of them where the signs differ.
    kept (n, n): elements in both masks of the largest changes.
    moved (dtypes, alphas, n), squares (n,): ⟨out − model, δ⟩ and ⟨δ, δ⟩ of the sample.
    sizes (n, BINS + 1): elements that didn't change, then those of each size.
    """

    def __init__(self, models: int, settings: Settings) -> None:
        """For so many models."""
        pairs = (models, models)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("products", "both", "signs", "kept"), pairs)
        shapes |= {"means": (models,), "squares": (models,), "touched": (), "split": ()}
        shapes |= {"moved": (len(settings.dtypes), len(settings.alphas), models), "sizes": (models, BINS + 1)}
        self.places: dict[str, tuple[slice, tuple[int, ...]]] = {}
        self.width = 0
        for name, shape in shapes.items():
            self.places[name] = slice(self.width, self.width + math.prod(shape)), shape
            self.width += math.prod(shape)


@dataclass(frozen=True)
class Tally:
    """The sums of one tensor, or of several together; those of a sample are scaled up to the tensor."""

    elements: int
    row: Numbers
    shapes: Shapes

    def __add__(self, other: Tally) -> Tally:
        """Of both together."""
        return Tally(self.elements + other.elements, self.row + other.row, self.shapes)

    def __getitem__(self, name: str) -> Numbers:
        """The sums of this name."""
        place, shape = self.shapes.places[name]
        return self.row[place].reshape(shape)

    @property
    def finite(self) -> bool:
        """Whether no weight was NaN or infinite."""
        return bool(np.isfinite(self["products"]).all())


@dataclass(frozen=True)
class Finding:
    """One tensor.

    Attributes:
        match: the tensor.
        tally: its sums.
        sce: SCE's coefficient of each model.
        stable_rank: of each model's delta; none where the tensor is no matrix.
        whole: whether the sample was the whole tensor.
    """

    match: Match
    tally: Tally
    sce: tuple[float, ...]
    stable_rank: tuple[float, ...]
    whole: bool


class Measured(NamedTuple):
    """What ``Deltas`` finds in a tensor: the sums as ``Shapes`` lays them out, and the rest as in ``Finding``."""

    sums: Numbers
    sce: tuple[float, ...]
    stable_rank: tuple[float, ...]
    whole: bool


class Deltas:
    """The study of a base and the models tuned from it."""

    sampled = True

    def __init__(self, settings: Settings, models: int) -> None:
        """With these choices, for so many models (without the base)."""
        self.settings, self.models = settings, models
        self.shapes = Shapes(models, settings)

    def look(self, match: Match, block: torch.Tensor) -> Reduction:
        """Sums over one block (1 + models, elements), the base's first."""
        moved = block[1:] - block[0]
        signs = moved.sign()
        changed = signs.abs()
        sums = {"products": _dots(moved.double()), "signs": _dots(signs), "both": _dots(changed)}
        if len(moved) > 2:  # of fewer models the sums above tell
            votes, balance = changed.sum(0), signs.sum(0).abs_()
            flags = torch.empty_like(votes)  # floats: bools cost four times as much
            sums["touched"] = torch.gt(votes, 0, out=flags).sum().double().numpy()
            sums["split"] = torch.lt(balance, votes, out=flags).sum().double().numpy()
        return sums

    def conclude(self, match: Match, sums: Reduction, sample: torch.Tensor) -> Measured:
        """What was found in one tensor."""
        tally = Tally(match.numel, np.zeros(self.shapes.width), self.shapes)
        for name, part in sums.items():
            tally[name][...] = _mirrored(part, self.models) if name in PAIRED else part
        if self.models <= 2:
            both, signs = tally["both"], tally["signs"]
            tally["split"][...] = (both[0, -1] - signs[0, -1]) / 2
            tally["touched"][...] = both.diagonal().sum() - (self.models - 1) * both[0, -1]
        tally["means"][...] = np.diag(tally["products"]) / match.numel
        moved = sample[1:] - sample[0]
        if not tally.finite:
            moved = torch.zeros_like(moved)  # such a tensor is named, and counts for nothing
        flat = moved.flatten(1)
        sampled = {
            "kept": self._kept(match, flat),
            "moved": self._extrapolated(sample[1:].flatten(1), flat),
            "squares": flat.double().square().sum(1),
            "sizes": _sizes(flat),
        }
        for name, of_sample in sampled.items():
            tally[name][...] = of_sample.numpy()
            tally[name][...] *= match.numel / flat[0].numel()
        rank = stable_rank(moved) if len(match.shape) == 2 and tally.finite else ()
        return Measured(tally.row, self._sce(match, tally, sample), rank, flat[0].numel() == match.numel)

    def _kept(self, match: Match, flat: torch.Tensor) -> torch.Tensor:
        """How many elements are in both masks, of each two models. Ties go to the lowest index, zeros to none."""
        count = int(self.settings.top_k * flat[0].numel())
        info = TensorInfo(match.name, (flat[0].numel(),), len(flat), has_base=False)
        sizes = list(flat.abs().float())
        steps = largest(info, lambda *_: sizes, lambda _, __, changed: [min(count, changed)], sampled=False)
        cuts = _answered(steps, sizes)
        masks = torch.stack([cut.mask(size, 0) for [cut], size in zip(cuts, sizes, strict=True)])
        return masks @ masks.T

    def _extrapolated(self, models: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """⟨out − model, δ⟩ after rounding, for each dtype, alpha and model."""
        found = torch.zeros(len(self.settings.dtypes), len(self.settings.alphas), len(flat), dtype=torch.float64)
        for of_dtype, name in zip(found, self.settings.dtypes, strict=True):
            for out, alpha in zip(of_dtype, self.settings.alphas, strict=True):
                written = torch.add(models, flat, alpha=alpha).to(dtypes.torch_dtype(name)).to(flat.dtype)
                out.copy_(written.sub_(models).mul_(flat).sum(1, dtype=torch.float64))
        return found

    def _sce(self, match: Match, tally: Tally, sample: torch.Tensor) -> tuple[float, ...]:
        """What SCE would weight each model by, found by the method itself; without selection from every element."""
        if self.settings.select_topk == 1:
            return shares(np.diag(tally["products"]))
        if not tally.finite:
            return (math.nan,) * (len(sample) - 1)
        block = list(sample.flatten(1))
        info = TensorInfo(match.name, (block[0].numel(),), len(block) - 1, has_base=True)
        merging = _answered(sce.sce(info, select_topk=self.settings.select_topk), block)
        assert isinstance(merging, WithCoefficients)
        return merging.coefficients


def _dots(rows: torch.Tensor) -> Numbers:
    """Inner products of rows: each with those before it, and itself. Those of signs are exact, being below 2²⁴."""
    each = rows.unbind()
    return np.array([torch.dot(one, other).item() for n, one in enumerate(each) for other in each[: n + 1]])


def _mirrored(lower: Numbers, count: int) -> Numbers:
    """The symmetric matrix of ``_dots``."""
    found = np.empty((count, count))
    rows, columns = np.tril_indices(count)
    found[rows, columns] = found[columns, rows] = lower
    return found


def shares(changes: Numbers) -> tuple[float, ...]:
    """Weights in proportion to each model's change, equal ones where nothing changed (VaRM's and SCE's formula)."""
    total = float(changes.sum())
    if math.isnan(total):
        return (math.nan,) * len(changes)
    return tuple((changes / total).tolist()) if total > 0 else (1 / len(changes),) * len(changes)


def stable_rank(matrices: torch.Tensor) -> tuple[float, ...]:
    """‖Δ‖²_F / ‖Δ‖²₂ of each matrix (models, rows, columns); NaN where all is zero.

    The largest singular value is iterated: twelve steps from four fixed random vectors, which errs by some percent, and
    upwards in the result, where many singular values are nearly the largest one. Small matrices are decomposed.
    """
    squares = matrices.double().square().sum((1, 2))
    if min(matrices.shape[1:]) <= EXACT_RANK:
        largest_value = torch.linalg.matrix_norm(matrices.double(), 2)
    else:
        found = torch.randn(matrices.shape[2], POWER_VECTORS, generator=torch.Generator().manual_seed(0))
        vectors = found.to(matrices.dtype).expand(len(matrices), -1, -1)
        scaled = matrices / matrices.abs().amax((1, 2), keepdim=True).clamp_(min=1e-30)  # squares don't underflow
        for _ in range(POWER_STEPS):
            vectors = torch.linalg.qr(scaled.mT @ (scaled @ vectors)).Q
        largest_value = torch.linalg.matrix_norm(matrices @ vectors, 2).double()
    return tuple((squares / largest_value.square()).tolist())


def _sizes(flat: torch.Tensor) -> torch.Tensor:
    """How many elements of each model didn't change, and how many changed by each power of two."""
    exponents = (flat.float().abs().view(torch.int32) >> FLOAT32_FRACTION) - (FLOAT32_BIAS + SMALLEST - 1)
    bins = exponents.clamp_(1, BINS).mul_(flat.sign().abs_().int())
    return torch.stack([torch.bincount(row, minlength=BINS + 1) for row in bins])


def _answered(steps: Generator[Request, Totals, Answer], block: Block) -> Answer:
    """Lead a search through one block in memory to its end."""
    return answered(steps, lambda request: figures_of(request.of, block, 0).numpy())
