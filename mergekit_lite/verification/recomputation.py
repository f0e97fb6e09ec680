"""Recomputation: makes tensors again by the plan and engine that made them, and holds them to the manifest."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.checkpoint.encodings.made import Made
from mergekit_lite.checkpoint.encodings.sum import Sum
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.deferred import np
from mergekit_lite.engine.devices import kind_of
from mergekit_lite.engine.pool import Workers
from mergekit_lite.engine.ray_workers import Cluster
from mergekit_lite.engine.report import report
from mergekit_lite.engine.run import workers_and_block
from mergekit_lite.engine.schedule import Progress, Schedule
from mergekit_lite.engine.sink import Records
from mergekit_lite.engine.tiling import bounds
from mergekit_lite.errors import MergekitLiteError, UsageError, counted
from mergekit_lite.planning import Plan
from mergekit_lite.verification.manifest_schema import Manifest
from mergekit_lite.verification.output_files import differing
from mergekit_lite.verification.result import Finding

if TYPE_CHECKING:
    import numpy.typing as npt

LAST_BITS = 1e-9  # relative tolerance of sums in float64
# Of so many elements one may differ by more than a rounding step between two kinds of devices: last bits of large terms
# are more than that where the terms nearly cancel, a hundred thousandth of the elements at most.
STRAY = 10_000


class ComparedRecords(Records):
    """A sink that compares what is made with the output, element by element.

    That is for two kinds of devices, whose last bits need not be the same. ``differing`` says by tensor how many
    elements differ, and how many of them by more than one rounding step; ``written`` are those that can be compared.
    """

    def __init__(self, written: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        self.differing: dict[str, tuple[int, int]] = {}
        self._written = written
        self._lock = threading.Lock()

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Compare bytes with those that stand in their place in the output."""
        if (spec := self._written.get(tensor)) is None:
            return
        size = dtypes.size(spec.dtype)
        stored = bytearray(len(data))
        with Reader() as reader:
            spec.fill(reader, offset // size, memoryview(stored))
        one, other = _ranks(data, size), _ranks(stored, size)
        differ = int((one != other).sum())
        stray = int((np.maximum(one, other) - 1 > np.minimum(one, other)).sum())
        with self._lock:
            before = self.differing.get(tensor, (0, 0))
            self.differing[tensor] = (before[0] + differ, before[1] + stray)


def _ranks(floats: memoryview | bytearray, size: int) -> npt.NDArray[np.int64]:
    """Return the ranks of floats of ``size`` bytes among all floats, from zero on: neighbours differ by 1."""
    bits = np.frombuffer(floats, f"<i{size}").astype(np.int64)
    return np.where(bits < 0, -(1 << 8 * size - 1) - bits, bits)  # below zero the sign is apart from the magnitude


class Recomputation:
    """Some tensors of a plan that are made again."""

    def __init__(
        self,
        plan: Plan,
        manifest: Manifest,
        written: Mapping[str, TensorSpec],
        jobs: Collection[int],
        devices: Sequence[str],
        threads: int | None,
        progress: Progress,
        processes: bool,
        crew: Cluster | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        ``written`` are the output's tensors, ``jobs`` indices in the plan, ``crew`` is of workers elsewhere; other
        arguments are those of ``verify``.
        """
        workers, block = workers_and_block(devices, threads)
        self.plan = plan
        self.manifest = manifest
        self.device = kind_of(devices[0])
        self.jobs = sorted(with_scales(plan, jobs))
        self.records: Records = Records()
        if self.device != manifest.device:
            planned = {job.name: (job.dtype, job.shape) for job in plan.jobs}
            as_planned = {name: spec for name, spec in written.items() if planned.get(name) == (spec.dtype, spec.shape)}
            self.records = ComparedRecords(as_planned)
            if crew is not None:
                raise UsageError(f"--ray takes the kind of device that made the output: --device {manifest.device}.")
        # Forked workers would count for themselves.
        team = Workers(workers, devices, block, processes and self.device == manifest.device, crew)
        self.schedule = Schedule(plan, {0: self.records}, team, progress, set(self.jobs))
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
        cuts = list(bounds(job.numel, job.merged_elements, job.dtype))
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
        if changed or differing(digests, recorded.output, spans_of_output) == []:
            return
        compared = self.records.differing.get(job.name) if isinstance(self.records, ComparedRecords) else None
        if compared is None or not any(record.device for record in records):
            yield Finding("manifest", self._why_other(index), job.name)
            return
        _, stray = compared
        if stray * STRAY > job.numel:
            what = (
                "its inputs are the same, but now give other bytes than those recorded, in "
                f"{counted(stray, 'element')} by more than a rounding step. It was made on another kind of device: "
                f"--device {self.manifest.device} makes it again to the bit"
            )
            yield Finding("manifest", what, job.name)

    @property
    def differs_in_last_bits(self) -> int:
        """How many elements differ from what another kind of device made of the same inputs."""
        if not isinstance(self.records, ComparedRecords):
            return 0
        return sum(differ for differ, _ in self.records.differing.values())

    def _why_other(self, index: int) -> str:
        """Say why the output's bytes may differ though no input does."""
        text = "its inputs are the same, but now give other bytes than those recorded"
        if index in self.grouped and len(self.jobs) < len(self.plan.jobs):
            text += "; another tensor that its thresholds or coefficients span may have changed: --all finds it"
        return text

    def _check_effect(self) -> Iterator[Finding]:
        """Compare the figures of the report, where the same kind of device computed them, with the recorded ones."""
        if self.device != self.manifest.device:
            return
        effect = report(self.plan, 0, self.records.made).to_json()
        if not _agree(json.loads(json.dumps(effect)), self.manifest.effect):
            yield Finding("manifest", "the figures under 'effect' are not those that its inputs give")


def with_scales(plan: Plan, jobs: Collection[int]) -> set[int]:
    """Return jobs with those that are made with them: FP8 codes and their scales."""
    names = {plan.jobs[index].name for index in jobs}
    return {
        index
        for index, job in enumerate(plan.jobs)
        if job.name in names or job.scales in names or (job.scales_of and job.scales_of in names)
    }


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
    if isinstance(spec.encoding, Made):
        return "an input that changed: what it is made of gives other values than when the output was made"
    others = " and its scales" * spec.quantised + " and what is added to it" * isinstance(spec.encoding, Sum)
    return f"an input that changed: not what was read{f' from it{others}' if others else ''} when the output was made"


def _place(spec: TensorSpec, begin: int, end: int) -> tuple[int, int] | None:
    """Return the bytes of some elements in their file; None where their values are not stored as they are."""
    if not spec.is_plain:
        return None
    size = dtypes.size(spec.dtype)
    return spec.offset + begin * size, spec.offset + end * size
