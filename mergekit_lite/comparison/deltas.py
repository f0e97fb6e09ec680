"""Measurement of the deltas of one tensor: sums over every element, and more expensive figures over a sample.

From every element: inner products of the deltas (float64), how many elements changed, how many changed in two models at
once and with which signs. From the sample: which elements are among the k largest, what rounding makes of an
extrapolation, the deltas' sizes by powers of two, SCE's coefficients where it selects, and the stable rank
‖Δ‖²_F / ‖Δ‖²₂.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from mergekit_lite import dtypes
from mergekit_lite.comparison.shared_tensors import SharedTensor
from mergekit_lite.comparison.survey import FULL_WIDTH, FloatArray, Sums
from mergekit_lite.deferred import torch
from mergekit_lite.errors import UsageError
from mergekit_lite.methods import sce
from mergekit_lite.methods.contract import Block, Reduction, TensorInfo, Totals, WithCoefficients, answered
from mergekit_lite.methods.statistics import largest
from mergekit_lite.ops.torch_ops import figures_of

Returned = TypeVar("Returned")

# Bins of |δ|: from 2**SMALLEST_EXPONENT on, each up to twice its start; smaller and larger ones go to the end bins.
SMALLEST_EXPONENT, SIZE_BINS = -44, 48
FLOAT32_BIAS, FLOAT32_FRACTION = 127, 23
POWER_STEPS, POWER_VECTORS = 12, 4
SYMMETRIC_SUMS = ("products", "signs", "both")  # of blocks: lower triangles, as ``_dots`` returns them
MOST_ONE_BY_ONE = 8  # rows; of more a product of matrices takes less time, though it is twice the work
EXACT_RANK = 64  # rows or columns up to which a matrix is decomposed instead of iterated


@dataclass(frozen=True)
class CompareSettings:
    """Options of a comparison.

    Attributes:
        top_k: share of the elements in a mask of the largest changes, in (0, 1].
        alphas, dtypes: the extrapolations and the roundings whose effective alphas are computed.
        select_topk: SCE's share of the elements to select, in (0, 1].
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


class SumLayout:
    """Place of each named sum in one row of numbers. Each is additive over tensors; n is the number of tuned models.

    products (n, n): ⟨δᵢ, δⱼ⟩. mean_squares (n,): ⟨δᵢ, δᵢ⟩ / elements.
    both (n, n): elements changed in both models. signs (n, n): those of equal signs less those of opposite signs.
    touched, split: elements that any model changed, and those of them where the signs differ.
    in_masks (n, n): elements in both masks of the largest changes.
    effective (dtypes, alphas, n), squares (n,): ⟨out − model, δ⟩ and ⟨δ, δ⟩ of the sample.
    sizes (n, SIZE_BINS + 1): elements that didn't change, then those of each size.
    """

    def __init__(self, models: int, settings: CompareSettings) -> None:
        """Lay out the sums for ``models`` tuned models."""
        pairs = (models, models)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("products", "both", "signs", "in_masks"), pairs)
        shapes |= {"mean_squares": (models,), "squares": (models,), "touched": (), "split": ()}
        shapes |= {"effective": (len(settings.dtypes), len(settings.alphas), models), "sizes": (models, SIZE_BINS + 1)}
        self.places: dict[str, tuple[slice, tuple[int, ...]]] = {}
        self.width = 0
        for name, shape in shapes.items():
            self.places[name] = slice(self.width, self.width + math.prod(shape)), shape
            self.width += math.prod(shape)


@dataclass(frozen=True)
class DeltaSums:
    """Sums of one tensor, or of several added up. Those of a sample are scaled up to the whole tensor."""

    elements: int
    row: FloatArray
    layout: SumLayout

    def __add__(self, other: DeltaSums) -> DeltaSums:
        """Add the sums of other tensors."""
        return DeltaSums(self.elements + other.elements, self.row + other.row, self.layout)

    def __getitem__(self, name: str) -> FloatArray:
        """Return a view of the sums of one name."""
        columns, shape = self.layout.places[name]
        return self.row[columns].reshape(shape)

    @property
    def finite(self) -> bool:
        """True where no weight was NaN or infinite."""
        return bool(np.isfinite(self["products"]).all())


@dataclass(frozen=True)
class TensorComparison:
    """Comparison of one tensor across the models.

    Attributes:
        tensor: the base's tensor and those of the models.
        sums: its sums.
        sce: SCE's coefficient of each model.
        stable_rank: of each model's delta; empty where the tensor is no matrix.
        whole: True where the sample was the whole tensor.
    """

    tensor: SharedTensor
    sums: DeltaSums
    sce: tuple[float, ...]
    stable_rank: tuple[float, ...]
    whole: bool


class DeltaResult(NamedTuple):
    """Result of ``DeltaMeasurement``: sums in the order of ``SumLayout``, the rest as in ``TensorComparison``."""

    sums: FloatArray
    sce: tuple[float, ...]
    stable_rank: tuple[float, ...]
    whole: bool


class DeltaMeasurement:
    """Measurement of a base and the models tuned from it."""

    needs_sample = True

    def __init__(self, settings: CompareSettings, models: int) -> None:
        """Prepare for ``models`` tuned models, the base not counted."""
        self.settings, self.models = settings, models
        self.layout = SumLayout(models, settings)

    def block_sums(self, tensor: SharedTensor, block: torch.Tensor) -> Sums:
        """Return the sums over one block (1 + models, elements), whose first row is the base's."""
        deltas = block[1:] - block[0]
        signs = deltas.sign()
        changed = signs.abs()
        sums = {"products": _dots(deltas.double()), "signs": _dots(signs), "both": _dots(changed)}
        if len(deltas) > 2:  # for one or two models ``result`` computes them from the sums above
            votes, balance = changed.sum(0), signs.sum(0).abs_()
            flags = torch.empty_like(votes)  # floats: bools cost four times as much
            sums["touched"] = torch.gt(votes, 0, out=flags).sum().double().numpy()
            sums["split"] = torch.lt(balance, votes, out=flags).sum().double().numpy()
        return sums

    def result(self, tensor: SharedTensor, totals: Sums, sample: torch.Tensor) -> DeltaResult:
        """Return the figures of one tensor from its sums and its sample (1 + models, rows, columns)."""
        sums = DeltaSums(tensor.numel, np.zeros(self.layout.width), self.layout)
        for name, total in totals.items():
            sums[name][...] = _mirrored(total, self.models) if name in SYMMETRIC_SUMS else total
        if self.models <= 2:
            both, signs = sums["both"], sums["signs"]
            sums["split"][...] = (both[0, -1] - signs[0, -1]) / 2
            sums["touched"][...] = both.diagonal().sum() - (self.models - 1) * both[0, -1]
        sums["mean_squares"][...] = np.diag(sums["products"]) / tensor.numel
        masks: list[torch.Tensor] = []
        rank: tuple[float, ...] = ()
        for first in range(0, self.models, FULL_WIDTH):  # some at once, so that memory doesn't grow with the models
            some = slice(first, first + FULL_WIDTH)
            models = sample[1:][some]
            deltas = models - sample[0]
            if not sums.finite:
                deltas = torch.zeros_like(deltas)  # such a tensor is named, and counts for nothing
            flat = deltas.flatten(1)
            masks += self._masks(tensor, flat)
            sums["effective"][..., some] = self._effective(models.flatten(1), flat).numpy()
            sums["squares"][some] = flat.double().square().sum(1).numpy()
            sums["sizes"][some] = _sizes(flat).numpy()
            rank += stable_rank(deltas) if len(tensor.shape) == 2 and sums.finite else ()
        together = torch.stack(masks)
        sums["in_masks"][...] = (together @ together.T).numpy()
        sampled = sample[0].numel()
        for name in ("in_masks", "effective", "squares", "sizes"):
            sums[name][...] *= tensor.numel / sampled
        return DeltaResult(sums.row, self._sce(tensor, sums, sample), rank, sampled == tensor.numel)

    def _masks(self, tensor: SharedTensor, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return for each model a mask of the largest changes, ones and zeros.

        Of equal sizes the lowest index is taken first; zeros are in no mask.
        """
        count = int(self.settings.top_k * flat[0].numel())
        info = TensorInfo(tensor.name, (flat[0].numel(),), len(flat), has_base=False)
        sizes = list(flat.abs().float())
        steps = largest(info, lambda *_: sizes, lambda _, __, changed: [min(count, changed)], sampled=False)
        cuts = _run_steps(steps, sizes)
        return [cut.mask(size, 0) for [cut], size in zip(cuts, sizes, strict=True)]

    def _effective(self, models: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """Return ⟨out − model, δ⟩ after rounding: (dtypes, alphas, models), float64."""
        products = torch.zeros(len(self.settings.dtypes), len(self.settings.alphas), len(flat), dtype=torch.float64)
        for of_dtype, name in zip(products, self.settings.dtypes, strict=True):
            for out, alpha in zip(of_dtype, self.settings.alphas, strict=True):
                written = torch.add(models, flat, alpha=alpha).to(dtypes.torch_dtype(name)).to(flat.dtype)
                out.copy_(written.sub_(models).mul_(flat).sum(1, dtype=torch.float64))
        return products

    def _sce(self, tensor: SharedTensor, sums: DeltaSums, sample: torch.Tensor) -> tuple[float, ...]:
        """Return SCE's coefficients: by the method itself from the sample, without selection from every element."""
        if self.settings.select_topk == 1:
            return shares(np.diag(sums["products"]))
        if not sums.finite:
            return (math.nan,) * (len(sample) - 1)
        block = list(sample.flatten(1))
        info = TensorInfo(tensor.name, (block[0].numel(),), len(block) - 1, has_base=True)
        merging = _run_steps(sce.sce(info, select_topk=self.settings.select_topk), block)
        assert isinstance(merging, WithCoefficients)
        return merging.coefficients


def _dots(rows: torch.Tensor) -> FloatArray:
    """Return inner products of rows: of each with those before it and itself. Signs have exact ones, below 2²⁴."""
    if len(rows) > MOST_ONE_BY_ONE:
        square: FloatArray = (rows @ rows.T).double().numpy()
        return square[np.tril_indices(len(rows))]
    each = rows.unbind()
    return np.array([torch.dot(one, other).item() for n, one in enumerate(each) for other in each[: n + 1]])


def _mirrored(lower: FloatArray, count: int) -> FloatArray:
    """Return the symmetric matrix (count, count) whose lower triangle ``_dots`` returned."""
    matrix = np.empty((count, count))
    rows, columns = np.tril_indices(count)
    matrix[rows, columns] = matrix[columns, rows] = lower
    return matrix


def shares(changes: FloatArray) -> tuple[float, ...]:
    """Return weights in proportion to each model's change, equal ones where nothing changed, as VaRM and SCE do."""
    total = float(changes.sum())
    if not math.isfinite(total):
        return (math.nan,) * len(changes)
    return tuple((changes / total).tolist()) if total > 0 else (1 / len(changes),) * len(changes)


def stable_rank(matrices: torch.Tensor) -> tuple[float, ...]:
    """Return ‖Δ‖²_F / ‖Δ‖²₂ of each matrix of (models, rows, columns); NaN where all elements are zero.

    The largest singular value of small matrices is computed by decomposition, of others by twelve power steps from four
    fixed random vectors. Where many singular values are nearly as large, that makes the rank some percent too high.
    """
    squares = matrices.double().square().sum((1, 2))
    if min(matrices.shape[1:]) <= EXACT_RANK:
        largest_value = torch.linalg.matrix_norm(matrices.double(), 2)
    else:
        start = torch.randn(matrices.shape[2], POWER_VECTORS, generator=torch.Generator().manual_seed(0))
        vectors = start.to(matrices.dtype).expand(len(matrices), -1, -1)
        scaled = matrices / matrices.abs().amax((1, 2), keepdim=True).clamp_(min=1e-30)  # squares don't underflow
        for _ in range(POWER_STEPS):
            vectors = torch.linalg.qr(scaled.mT @ (scaled @ vectors)).Q
        largest_value = torch.linalg.matrix_norm(matrices @ vectors, 2).double()
    return tuple((squares / largest_value.square()).tolist())


def _sizes(flat: torch.Tensor) -> torch.Tensor:
    """Count per model the elements that didn't change, then those of each power of two: (models, SIZE_BINS + 1)."""
    # the exponent bits of |δ| as float32, numbered from 1; unchanged elements are multiplied to bin 0
    exponents = (flat.float().abs().view(torch.int32) >> FLOAT32_FRACTION) - (FLOAT32_BIAS + SMALLEST_EXPONENT - 1)
    bins = exponents.clamp_(1, SIZE_BINS).mul_(flat.sign().abs_().int())
    return torch.stack([torch.bincount(row, minlength=SIZE_BINS + 1) for row in bins])


def _run_steps(steps: Generator[Reduction, Totals, Returned], block: Block) -> Returned:
    """Run the steps of a method over one block in memory, and return what they return."""
    return answered(steps, lambda reduction: figures_of(reduction.of, block, 0).numpy())
