"""Recomputation: makes tensors again by the plan and engine that made them, and holds them to the manifest."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.checkpoint.encodings.sum import Sum
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.pool import Workers
from mergekit_lite.engine.report import report
from mergekit_lite.engine.run import workers_and_block
from mergekit_lite.engine.schedule import Progress, Schedule
from mergekit_lite.engine.sink import Records
from mergekit_lite.engine.tiling import bounds
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.planning import Plan
from mergekit_lite.verification.manifest_schema import Manifest
from mergekit_lite.verification.output_files import differing
from mergekit_lite.verification.result import Finding

LAST_BITS = 1e-9  # relative tolerance of sums in float64


class Recomputation:
    """Some tensors of a plan that are made again."""

    def __init__(
        self,
        plan: Plan,
        manifest: Manifest,
        jobs: Collection[int],
        device: str,
        threads: int | None,
        progress: Progress,
        processes: bool,
    ) -> None:
        """Prepare; nothing is read yet. ``jobs`` are indices in the plan, other arguments are those of ``verify``."""
        workers, block = workers_and_block(device, threads)
        self.plan = plan
        self.manifest = manifest
        self.device = device
        self.jobs = sorted(jobs)
        self.records = Records()
        team = Workers(workers, device, block, processes)
        self.schedule = Schedule(plan, {0: self.records}, team, progress, set(jobs))
        self.grouped = {index for (index, _), merge in self.schedule.shared.items() if merge.group is not None}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that are made again."""
        return tuple(self.plan.jobs[index].name for index in self.jobs)

    @property
    def also_read(self) -> int:
        """Number of other tensors that have to be read, as thresholds or coefficients span them."""
        return len({index for index, _ in self.schedule.shared} - set(self.jobs))

    def run(self) -> list[Finding]:
        """Make the tensors, compare them, and return what differs."""
        try:
            self.schedule.run()
            for source in self.plan.inputs:
                source.check_unchanged()
        except MergekitLiteError as error:
            return [Finding("inputs", f"can't be read to the end: {error}")]
        findings = [finding for index in self.jobs for finding in self._check_tensor(index)]
        if not findings and len(self.jobs) == len(self.plan.jobs):
            findings += self._check_effect()
        return findings

    def _check_tensor(self, index: int) -> Iterator[Finding]:
        """Compare the digests of one tensor and of its inputs with the recorded ones."""
        job = self.plan.jobs[index]
        recorded = self.manifest.tensors.get(job.name)
        partly_merged = job.merged_elements if 0 < job.merged_elements < job.numel else None
        if recorded is None or len(recorded.inputs) != len(job.inputs) or recorded.merged != partly_merged:
            yield Finding("manifest", "has no digests of it, or of other inputs or spans than it has", job.name)
            return
        cuts = list(bounds(job.numel, job.merged_elements))
        records = [self.records.made[index, begin] for begin, _ in cuts]
        changed = False
        for number, spec in enumerate(job.inputs):
            digests = [record.inputs[number] for record in records if number < len(record.inputs)]
            spans = recorded.spans.inputs[number : number + 1] if recorded.spans else []
            wrong = differing(digests, recorded.inputs[number], spans[0] if spans else None)
            for span in [None] if wrong is None else wrong:
                changed = True
                reference = self.plan.inputs[job.models[number]].reference
                place = None if span is None or not cuts else _place(spec, *cuts[span])
                yield Finding(f"{reference}: {spec.file.name}", _what_changed(spec), spec.name, place)
        digests = [record.output for record in records]
        spans_of_output = recorded.spans.output if recorded.spans else None
        if not changed and differing(digests, recorded.output, spans_of_output) != []:
            yield Finding("manifest", self._why_other(index), job.name)

    def _why_other(self, index: int) -> str:
        """Say why the output's bytes may differ though no input does."""
        text = "its inputs are the same, but now give other bytes than those recorded"
        if index in self.grouped and len(self.jobs) < len(self.plan.jobs):
            text += "; another tensor that its thresholds or coefficients span may have changed: --all finds it"
        return text

    def _check_effect(self) -> Iterator[Finding]:
        """Compare the figures of the report, which are those of all tensors on the CPU, with the recorded ones."""
        if self.device != CPU:
            return
        effect = report(self.plan, 0, self.records.made).to_json()
        if not _agree(json.loads(json.dumps(effect)), self.manifest.effect):
            yield Finding("manifest", "the figures under 'effect' are not those that its inputs give")


def _agree(one: object, other: object) -> bool:
    """Return True where figures are equal but for the last bits of sums, which depend on machine and kernels."""
    match one, other:
        case dict(), dict():
            return one.keys() == other.keys() and all(_agree(one[key], other[key]) for key in one)
        case list(), list():
            return len(one) == len(other) and all(map(_agree, one, other))
        case float(), float():
            return math.isclose(one, other, rel_tol=LAST_BITS) or repr(one) == repr(other)  # NaN, too, is itself
    return one == other


def _what_changed(spec: TensorSpec) -> str:
    """Say that the bytes of an input tensor changed, or those that it is computed from."""
    others = " and its scales" * spec.quantised + " and what is added to it" * isinstance(spec.encoding, Sum)
    return f"an input that changed: not what was read{f' from it{others}' if others else ''} when the output was made"


def _place(spec: TensorSpec, begin: int, end: int) -> tuple[int, int] | None:
    """Return the bytes of some elements in their file; None where their values are not stored as they are."""
    if not spec.is_plain:
        return None
    size = dtypes.size(spec.dtype)
    return spec.offset + begin * size, spec.offset + end * size
