"""Compare models tuned from one base: what each changed, where, and whether they pull the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from statistics import median

import numpy as np

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.comparison.deltas import Deltas, Finding, Settings, Tally, shares
from mergekit_lite.comparison.survey import Numbers, Progress, survey
from mergekit_lite.dtypes import float_named
from mergekit_lite.errors import UsageError
from mergekit_lite.options import named_options
from mergekit_lite.planning.delta_check import BORDER, RMS_OF_ALIGNMENT, RMS_OF_FINETUNING
from mergekit_lite.vectors.matching import Unmatched, match

TINY = 1e-6  # RMS below which even an alignment on a 7B model would be unusually small
HUGE = 1e-3

Row = tuple[float | None, ...]  # one figure for each model, or for each pair with it
Square = tuple[Row, ...]


@dataclass(frozen=True)
class Figures:
    """What the sums of a tensor, a layer or a model come to. None where a figure has no meaning (0 / 0).

    Attributes:
        elements: how many.
        norm, rms: of each model's delta.
        changed: share of the elements that differ from the base's.
        cosine: between the deltas.
        both: share of the elements that both models changed.
        agree, conflict: shares of those where the signs agree, or don't.
        split: share of the elements that any model changed where not all that changed it agree in sign.
        overlap: elements in both masks of the largest changes, as a share of the smaller mask.
        varm: each model's coefficient, as VaRM has it for this unit.
        sce: the mean over tensors of SCE's coefficients.
        effective: alpha after rounding, for each dtype, each alpha, each model.
        stable_rank: ‖Δ‖²_F / ‖Δ‖²₂, of several tensors the median.
        sizes: share of the elements that didn't change, then of each size (powers of two, see ``deltas.SMALLEST``).
    """

    elements: int
    norm: Row
    rms: Row
    changed: Row
    cosine: Square
    both: Square
    agree: Square
    conflict: Square
    split: float | None
    overlap: Square
    varm: Row
    sce: Row
    effective: tuple[Square, ...]
    stable_rank: Row
    sizes: Square


@dataclass(frozen=True)
class Comparison:
    """A base, the models tuned from it, and what was found in each tensor.

    Attributes:
        base, models: their references.
        settings: what was chosen.
        findings: of each tensor, in the order of the base's files.
        unmatched: what was not compared, and why.
        notes: what the user should know.
    """

    base: str
    models: tuple[str, ...]
    settings: Settings
    findings: tuple[Finding, ...]
    unmatched: tuple[Unmatched, ...]
    notes: tuple[str, ...]

    @property
    def nonfinite(self) -> list[str]:
        """Tensors with NaN or infinity, which layers and totals leave out."""
        return [finding.match.name for finding in self.findings if not finding.tally.finite]

    @property
    def whole(self) -> bool:
        """Whether every sample was the whole tensor, so that all figures are exact."""
        return all(finding.whole for finding in self.findings)

    @cached_property
    def overall(self) -> Figures:
        """Of all tensors together. VaRM's coefficients are those of its granularity ``model``."""
        return self._together(self.findings, "products")

    @cached_property
    def layers(self) -> dict[str, Figures]:
        """Of each layer, and of the tensors outside them, by name; VaRM's are those of its granularity ``layer``."""
        members: dict[str, list[Finding]] = {}
        for finding in self.findings:
            members.setdefault(layer_name(finding), []).append(finding)
        return {name: self._together(found, "means") for name, found in sorted(members.items(), key=_by_layer)}

    def of(self, finding: Finding) -> Figures:
        """Of one tensor."""
        return self._figures(finding.tally, "products", [finding])

    def _together(self, findings: Sequence[Finding], weighing: str) -> Figures:
        finite = [finding for finding in findings if finding.tally.finite]
        tally = reduce(add, (finding.tally for finding in (finite or findings)))
        return self._figures(tally, weighing, finite or findings)

    def _figures(self, tally: Tally, weighing: str, findings: Iterable[Finding]) -> Figures:
        norms = np.sqrt(np.diag(tally["products"]))
        both, elements = tally["both"], tally.elements
        weighed = np.diag(tally["products"]) if weighing == "products" else tally["means"]
        kept = np.diag(tally["kept"])
        sce = np.array([finding.sce for finding in findings])
        ranks = [finding.stable_rank for finding in findings if finding.stable_rank]
        return Figures(
            elements=elements,
            norm=_row(norms),
            rms=_row(norms / math.sqrt(elements)),
            changed=_row(np.diag(both) / elements),
            cosine=_square(_cosines(tally["products"])),
            both=_square(both / elements),
            agree=_square(_ratio((both + tally["signs"]) / 2, both)),
            conflict=_square(_ratio((both - tally["signs"]) / 2, both)),
            split=_row(_ratio(tally["split"], tally["touched"]).reshape(1))[0],
            overlap=_square(_ratio(tally["kept"], np.minimum.outer(kept, kept))),
            varm=_row(np.array(shares(weighed))),
            sce=_row(sce.mean(0)),
            effective=tuple(_square(_ratio(of_dtype, tally["squares"])) for of_dtype in tally["moved"]),
            stable_rank=tuple(_median(of_model) for of_model in zip(*ranks, strict=True)) or (None,) * len(self.models),
            sizes=_square(tally["sizes"] / elements),
        )


@named_options
def compare(
    base: str | Path,
    models: Sequence[str | Path],
    *,
    top_k: float = 0.2,
    alphas: Sequence[float] = (0.1, 0.3, 0.5),
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    select_topk: float = 1.0,
    threads: int | None = None,
    progress: Progress | None = None,
    processes: bool = False,
) -> Comparison:
    """Compare what some models changed in their common base: one read of each.

    Args:
        base: a path or hub reference.
        models: one or more, tuned from it.
        top_k: share of the elements in a mask of the largest changes, in (0, 1].
        alphas: of the extrapolations whose effect after rounding is computed.
        dtypes: the float dtypes that those are rounded to.
        select_topk: SCE's share of the elements to select, in (0, 1].
        threads: workers, one for each core by default.
        progress: called with (bytes read, bytes in all).
        processes: fork the workers, as for ``run``.

    Returns:
        Figures of each tensor, each layer and all of the model.

    Raises:
        UsageError: an option is wrong, or no model is given.
        CheckpointError: a model can't be opened, or changed while it was read.
        PlanError: no tensor can be compared.
        RunError: a file can't be read.
    """
    settings = Settings(top_k, tuple(alphas), tuple(map(float_named, dtypes)), select_topk)
    if not models:
        raise UsageError("Name at least one model to compare with the base.")
    opened = [open_checkpoint(reference) for reference in (base, *models)]
    matches, unmatched, notes = match(opened)
    study = Deltas(settings, len(models))
    # the sums of all in one piece of memory: kept one by one between freed temporaries they made the heap grow
    rows = np.empty((len(matches), study.shapes.width))
    found: dict[int, Finding] = {}
    for number, (sums, sce, rank, whole) in survey(matches, study, threads, progress, processes):
        rows[number] = sums
        tally = Tally(matches[number].numel, rows[number], study.shapes)
        found[number] = Finding(matches[number], tally, sce, rank, whole)
    for checkpoint in opened:
        checkpoint.check_unchanged()
    return Comparison(
        str(base),
        tuple(map(str, models)),
        study.settings,
        tuple(found[number] for number in range(len(matches))),
        tuple(unmatched),
        tuple(notes),
    )


def layer_name(finding: Finding) -> str:
    """``model.layers.3``, or ``outside the layers``."""
    match = finding.match
    if match.layer is None:
        return "outside the layers"
    return f"{match.stack}.{match.layer}" if match.stack else str(match.layer)


def letter(number: int) -> str:
    """What a model is called for short: A, B … Z, A2 …"""
    return chr(ord("A") + number % 26) + (str(number // 26 + 1) if number >= 26 else "")


def looks_like(rms: float | None) -> str:
    """What the size of a delta suggests: a hint, as small models and high learning rates have larger ones."""
    if rms is None or math.isnan(rms):
        return "not finite"
    if rms == 0:
        return "the same weights"
    if rms < TINY:
        return "smaller than an alignment"
    if rms <= BORDER:
        return "like an alignment (DPO)"
    return "like a fine-tune (SFT)" if rms <= HUGE else "larger than a fine-tune"


BANDS = (
    f"The bands are those of one 7B model: SFT → DPO had RMS(delta) {RMS_OF_ALIGNMENT:.1e}, pretraining → SFT "
    f"{RMS_OF_FINETUNING:.1e}. Small models and high learning rates have larger deltas."
)


def _by_layer(named: tuple[str, list[Finding]]) -> tuple[bool, str, int]:
    match = named[1][0].match
    return match.layer is not None, match.stack or "", match.layer or 0


def _cosines(products: Numbers) -> Numbers:
    norms = np.sqrt(np.diag(products))
    return _ratio(products, np.outer(norms, norms)).clip(-1, 1)


def _ratio(part: Numbers, whole: Numbers) -> Numbers:
    """Elementwise quotient, NaN where it is 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.true_divide(part, whole))


def _row(values: Numbers) -> Row:
    return tuple(float(value) if math.isfinite(value) else None for value in values)


def _square(values: Numbers) -> Square:
    return tuple(_row(row) for row in values)


def _median(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else None
