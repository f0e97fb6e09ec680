"""Compare models tuned from one base: what each changed, where, and whether they pull the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from statistics import median

import numpy as np

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.naming.alignment import shown_as
from mergekit_lite.comparison.deltas import CompareSettings, DeltaMeasurement, DeltaSums, TensorComparison, shares
from mergekit_lite.comparison.shared_tensors import Unmatched, shared_tensors
from mergekit_lite.comparison.survey import FloatArray, survey
from mergekit_lite.dtypes import float_named
from mergekit_lite.engine.ray_cluster import files_of, workers_of
from mergekit_lite.engine.ray_workers import Cluster
from mergekit_lite.engine.schedule import Progress
from mergekit_lite.errors import UsageError
from mergekit_lite.methods.relex import differ
from mergekit_lite.mixtures.numbering import renumbered
from mergekit_lite.options import named_options
from mergekit_lite.planning.delta_check import BORDER, RMS_OF_ALIGNMENT, RMS_OF_FINETUNING
from mergekit_lite.planning.vocabularies import in_common
from mergekit_lite.training_runs import run_of

SMALLEST_ALIGNMENT = 1e-6  # RMS below which even an alignment on a 7B model would be unusually small
LARGEST_FINETUNING = 1e-3

ModelValues = tuple[float | None, ...]  # one figure for each model
PairValues = tuple[ModelValues, ...]  # one figure for each two models, or another square


@dataclass(frozen=True)
class DeltaFigures:
    """Figures of a tensor, a layer or a whole model. None stands for a figure without meaning (0 / 0).

    Attributes:
        elements: number of elements.
        norm, rms: ‖δ‖ and ‖δ‖ / √elements of each model's delta.
        changed: share of the elements that differ from the base's.
        cosine: between each two deltas.
        both: share of the elements that both models changed.
        agree, conflict: shares of those whose signs agree, or don't.
        split: share of the elements that any model changed where not all that changed it agree in sign.
        overlap: elements in both masks of the largest changes, as a share of the smaller mask.
        varm: each model's coefficient, as VaRM computes it for this tensor, layer or model.
        sce: SCE's coefficients, averaged over tensors.
        effective: alpha after rounding, for each dtype, each alpha, each model.
        stable_rank: ‖Δ‖²_F / ‖Δ‖²₂ of each model's delta; the median where there are several tensors.
        sizes: share of the elements that didn't change, then of each size (powers of two from
            2 ** ``deltas.SMALLEST_EXPONENT`` on).
    """

    elements: int
    norm: ModelValues
    rms: ModelValues
    changed: ModelValues
    cosine: PairValues
    both: PairValues
    agree: PairValues
    conflict: PairValues
    split: float | None
    overlap: PairValues
    varm: ModelValues
    sce: ModelValues
    effective: tuple[PairValues, ...]
    stable_rank: ModelValues
    sizes: PairValues


@dataclass(frozen=True)
class Comparison:
    """A base, the models tuned from it, and the figures of each tensor, of each layer and of all.

    Attributes:
        base, models: their references.
        settings: the options of ``compare``.
        tensors: the sums of each tensor, in the order of the base's files.
        unmatched: the tensors that were not compared, each with the reason.
        notes: facts that the user should know.
        steps: of the models, rising, where they are the checkpoints of one training run; else none.
    """

    base: str
    models: tuple[str, ...]
    settings: CompareSettings
    tensors: tuple[TensorComparison, ...]
    unmatched: tuple[Unmatched, ...]
    notes: tuple[str, ...]
    steps: tuple[float, ...] = ()

    @property
    def shown(self) -> range:
        """Numbers of the models that are told of one by one: all, but of a run the last checkpoint alone."""
        return range(len(self.models) - 1 if self.steps else 0, len(self.models))

    @property
    def nonfinite(self) -> list[str]:
        """Names of the tensors with NaN or infinity, which layers and totals leave out."""
        return [compared.tensor.name for compared in self.tensors if not compared.sums.finite]

    @property
    def whole(self) -> bool:
        """True where every sample was the whole tensor, so that all figures are exact."""
        return all(compared.whole for compared in self.tensors)

    @property
    def most_changed(self) -> list[TensorComparison]:
        """The tensors by the largest mean square of any delta, falling."""
        return sorted(self.tensors, key=lambda compared: -float(compared.sums["mean_squares"].max()))

    @cached_property
    def overall(self) -> DeltaFigures:
        """Figures of all tensors together. VaRM's coefficients are those of its granularity ``model``."""
        return self._joint_figures(self.tensors, "products")

    @cached_property
    def layers(self) -> dict[str, DeltaFigures]:
        """Figures of each layer, and of the tensors outside them, by name.

        VaRM's coefficients are those of its granularity ``layer``.
        """
        layers: dict[str, list[TensorComparison]] = {}
        for compared in self.tensors:
            layers.setdefault(layer_name(compared), []).append(compared)
        return {
            name: self._joint_figures(members, "mean_squares")
            for name, members in sorted(layers.items(), key=_by_layer)
        }

    def figures(self, compared: TensorComparison) -> DeltaFigures:
        """Return the figures of one tensor."""
        return self._figures([compared], compared.sums, "products")

    def _joint_figures(self, tensors: Sequence[TensorComparison], varm_from: str) -> DeltaFigures:
        """Return the figures of several tensors, without those that aren't finite if others are."""
        counted = [compared for compared in tensors if compared.sums.finite] or tensors
        return self._figures(counted, reduce(add, (compared.sums for compared in counted)), varm_from)

    def _figures(self, tensors: Sequence[TensorComparison], sums: DeltaSums, varm_from: str) -> DeltaFigures:
        """Return the figures of some tensors.

        Args:
            tensors: the tensors.
            sums: the sum of theirs.
            varm_from: name of the sums that VaRM's coefficients are in proportion to.
        """
        norms = np.sqrt(np.diag(sums["products"]))
        both, elements = sums["both"], sums.elements
        changes = np.diag(sums["products"]) if varm_from == "products" else sums[varm_from]
        mask_sizes = np.diag(sums["in_masks"])
        sce = np.array([compared.sce for compared in tensors])
        ranks = [compared.stable_rank for compared in tensors if compared.stable_rank]
        return DeltaFigures(
            elements=elements,
            norm=or_none(norms),
            rms=or_none(norms / math.sqrt(elements)),
            changed=or_none(np.diag(both) / elements),
            cosine=rows_or_none(cosines(sums["products"])),
            both=rows_or_none(both / elements),
            agree=rows_or_none(_ratio((both + sums["signs"]) / 2, both)),
            conflict=rows_or_none(_ratio((both - sums["signs"]) / 2, both)),
            split=or_none(_ratio(sums["split"], sums["touched"]).reshape(1))[0],
            overlap=rows_or_none(_ratio(sums["in_masks"], np.minimum.outer(mask_sizes, mask_sizes))),
            varm=or_none(np.array(shares(changes))),
            sce=or_none(sce.mean(0)),
            effective=tuple(rows_or_none(_ratio(of_dtype, sums["squares"])) for of_dtype in sums["effective"]),
            stable_rank=tuple(_median(of_model) for of_model in zip(*ranks, strict=True)) or (None,) * len(self.models),
            sizes=rows_or_none(sums["sizes"] / elements),
        )


@named_options
def compare(
    base: str | Path,
    models: str | Path | Sequence[str | Path],
    *,
    top_k: float = 0.2,
    alphas: Sequence[float] = (0.1, 0.3, 0.5),
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    select_topk: float = 1.0,
    run: bool = False,
    steps: Sequence[float] = (),
    threads: int | None = None,
    progress: Progress | None = None,
    processes: bool = False,
    ray: str | Cluster | None = None,
) -> Comparison:
    """Compare what some models changed in their common base: one read of each.

    Args:
        base: a path or hub reference.
        models: one or more, tuned from it; of a ``run`` also the folder that holds its checkpoints, or a pattern.
        top_k: share of the elements in a mask of the largest changes, in (0, 1].
        alphas: of the extrapolations whose effect after rounding is computed.
        dtypes: the float dtypes that those are rounded to.
        select_topk: SCE's share of the elements to select, in (0, 1].
        run: take the models for the checkpoints of one training run that began with the base (see ``run_path``).
        steps: at which they were written, with ``run``; by default those in their names.
        threads: workers, one for each core by default.
        progress: called with (bytes read, bytes in all).
        processes: fork the workers, as for ``run``.
        ray: work on the machines of a Ray cluster, as for ``run``.

    Returns:
        Figures of each tensor, each layer and all of the model.

    Raises:
        UsageError: an option is wrong, no model is given, or the steps of a run aren't clear.
        CheckpointError: a model can't be opened, or changed while it was read.
        PlanError: no tensor can be compared.
        RunError: a file can't be read.
    """
    settings = CompareSettings(top_k, tuple(alphas), tuple(map(float_named, dtypes)), select_topk)
    if steps and not run:
        raise UsageError("Steps are those of a run's checkpoints: compare with --run.")
    models, at = _in_order(*run_of(models, steps)) if run else (_several(models), ())
    if not models:
        raise UsageError("Name at least one model to compare with the base.")
    first, *others = (open_checkpoint(reference) for reference in (base, *models))
    opened, notes_on_rows = in_common([first, *(shown_as(model, first) for model in others)])
    tensors, unmatched, notes = shared_tensors(opened)
    notes = [*notes, *renumbered(opened)]
    measurement = DeltaMeasurement(settings, len(models))
    # the sums of all tensors in one piece of memory: one by one between freed temporaries they made the heap grow
    rows = np.empty((len(tensors), measurement.layout.width))
    compared: dict[int, TensorComparison] = {}
    with workers_of(ray, workers=threads) as crew:
        if crew is not None and not crew.local:
            crew.must_see(files_of(opened))
        for number, result in survey(tensors, measurement, threads, progress, processes, crew):
            rows[number] = result.sums
            sums = DeltaSums(tensors[number].numel, rows[number], measurement.layout)
            compared[number] = TensorComparison(tensors[number], sums, result.sce, result.stable_rank, result.whole)
    for checkpoint in opened:
        checkpoint.check_unchanged()
    return Comparison(
        str(base),
        tuple(map(str, models)),
        settings,
        tuple(compared[number] for number in range(len(tensors))),
        tuple(unmatched),
        (*notes, *notes_on_rows),
        at,
    )


def _several(models: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(models)] if isinstance(models, str | Path) else list(map(str, models))


def _in_order(models: Sequence[str], steps: Sequence[float]) -> tuple[list[str], tuple[float, ...]]:
    """Return the checkpoints of a run in the order of their steps, and these.

    Raises UsageError where they make no path.
    """
    if len(models) < 2:
        raise UsageError("The path of a run takes two checkpoints or more.")
    if min(steps) < 0:
        raise UsageError(f"Steps are counted from 0, got {min(steps):g}.")
    differ(step=tuple(steps))
    ordered = sorted(zip(steps, models, strict=True))
    return [model for _, model in ordered], tuple(step for step, _ in ordered)


def layer_name(compared: TensorComparison) -> str:
    """Return the name of a tensor's layer, as ``model.layers.3``, or ``outside the layers``."""
    tensor = compared.tensor
    if tensor.layer is None:
        return "outside the layers"
    return f"{tensor.stack}.{tensor.layer}" if tensor.stack else str(tensor.layer)


def letter(number: int) -> str:
    """Return the short name of a model by its number: A, B, up to Z, then A2 and so on."""
    return chr(ord("A") + number % 26) + (str(number // 26 + 1) if number >= 26 else "")


def looks_like(rms: float | None) -> str:
    """Say what the size of a delta suggests. A hint: small models and high learning rates have larger deltas."""
    if rms is None or math.isnan(rms):
        return "not finite"
    if rms == 0:
        return "the same weights"
    if rms < SMALLEST_ALIGNMENT:
        return "smaller than an alignment"
    if rms <= BORDER:
        return "like an alignment (DPO)"
    return "like a fine-tune (SFT)" if rms <= LARGEST_FINETUNING else "larger than a fine-tune"


BANDS = (
    f"The bands are those of one 7B model: SFT → DPO had RMS(delta) {RMS_OF_ALIGNMENT:.1e}, pretraining → SFT "
    f"{RMS_OF_FINETUNING:.1e}. Small models and high learning rates have larger deltas."
)


def _by_layer(layer: tuple[str, list[TensorComparison]]) -> tuple[bool, str, int]:
    """Return the key that sorts layers by stack and number, the tensors outside them first."""
    tensor = layer[1][0].tensor
    return tensor.layer is not None, tensor.stack or "", tensor.layer or 0


def cosines(products: FloatArray) -> FloatArray:
    """Return the cosine of each two vectors from their inner products; NaN where one is zero."""
    norms = np.sqrt(np.diag(products))
    return _ratio(products, np.outer(norms, norms)).clip(-1, 1)


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    """Return the elementwise quotient, NaN for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.true_divide(part, whole))


def or_none(values: FloatArray) -> ModelValues:
    """Return numbers as plain ones, None for what isn't finite."""
    return tuple(float(value) if math.isfinite(value) else None for value in values)


def rows_or_none(values: FloatArray) -> PairValues:
    """Return rows of numbers as plain ones, None for what isn't finite."""
    return tuple(map(or_none, values))


def _median(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else None
