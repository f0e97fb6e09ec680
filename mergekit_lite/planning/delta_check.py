"""The delta, looked at before the run: its size on a small sample tells alignment from fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.checkpoint.extents import extents
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.ops import TensorKind, ops_for
from mergekit_lite.ops.operations import InnerProducts
from mergekit_lite.planning import Plan

TENSORS = 128
ELEMENTS = 1 << 14
DIFFERENCE = InnerProducts(from_base=True)

# RMS of an element's change, measured on zephyr-7b (ExPO paper, Table 1, divided by √numel): SFT→DPO 6.3e-6,
# extrapolates well; pretraining→SFT 2.0e-4, collapses. The border is their geometric mean.
RMS_OF_ALIGNMENT = 6.348e-6
RMS_OF_FINETUNING = 1.955e-4
BORDER = math.sqrt(RMS_OF_ALIGNMENT * RMS_OF_FINETUNING)


def delta_rms(plan: Plan) -> float | None:
    """Return the root mean square of (first − second input) over a fixed sample: the middle of evenly spaced tensors.

    None where no tensor is merged.
    """
    jobs = plan.merged
    chosen = [jobs[number * len(jobs) // min(TENSORS, len(jobs))] for number in range(min(TENSORS, len(jobs)))]
    square = elements = 0.0
    parts = []
    for job in chosen:
        count = min(ELEMENTS, job.merged_elements)
        parts += [((job.inputs[0], job.inputs[:2][-1]), (job.merged_elements - count) // 2, count)] * bool(count)
    with Reader() as reader:
        reader.expect(
            (*extent, turn)
            for turn, (specs, start, count) in enumerate(parts)
            for spec in specs
            for extent in extents(spec, start, start + count)
        )
        for specs, start, count in parts:
            square += _square(reader, specs, start, count)
            elements += count
    return math.sqrt(square / elements) if elements else None


def _square(reader: Reader, specs: Sequence[TensorSpec], start: int, count: int) -> float:
    """Return the sum of the squares of the differences of two tensors, over some elements."""
    ops = ops_for(DIFFERENCE, TensorKind(tuple(spec.dtype for spec in specs)))
    chunks = [memoryview(bytearray(count * dtypes.size(spec.dtype))) for spec in specs]
    for spec, chunk in zip(specs, chunks, strict=True):
        spec.fill(reader, start, chunk)
    views = [ops.of_bytes(chunk, spec.dtype) for chunk, spec in zip(chunks, specs, strict=True)]
    [square] = ops.figures(DIFFERENCE, views)
    return square


def delta_warning(plan: Plan) -> str | None:
    """Return what the size of the delta suggests, where it suggests trouble."""
    if any(job.method != "expo" for job in plan.merged):
        return None  # the bands are those of alignment
    rms = delta_rms(plan)
    if rms is None or math.isnan(rms):
        return None
    if rms == 0:
        return (
            "RMS(delta) is 0 in a sample of the weights: the two models seem to be the same one, and any alpha gives "
            "it back. Check the two paths."
        )
    if rms > BORDER:
        return (
            f"RMS(delta) is {rms:.1e} in a sample of the weights: nearer to pretraining→SFT ({RMS_OF_FINETUNING:.0e} "
            f"on a 7B model), where extrapolation is known to collapse, than to SFT→DPO ({RMS_OF_ALIGNMENT:.0e}). Is "
            "the first model really the SFT start of the second? Small models and high learning rates have larger "
            "deltas: measure before you trust either."
        )
    return None
