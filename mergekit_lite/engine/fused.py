"""Results of a plan that are made while the next plan reads them, block by block, instead of lying on a disk between.

Each block goes through the very operation that a run of its own would give it, and is rounded to the dtype that it
would be written in. So what is made of it has the same bytes either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.checkpoint.encodings.made import Made
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.tensor_merge import JobMerge, cast_ops, needs_torch
from mergekit_lite.engine.tiling import BLOCK, CHUNK, cut
from mergekit_lite.ops.operations import Cast
from mergekit_lite.planning import Job, Plan


class NotMadeError(Exception):
    """A tensor that can't be made while it is read; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class MadeByJob(Made):
    """The result of a job of a plan that has one output; ``offset`` and ``extent`` are as in ``TensorInfo``."""

    job: Job
    plan: Plan  # as workers have it
    offset: int
    extent: int

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Merge the elements block by block; those behind ``merged_elements`` are copies, cast to the dtype."""
        size, merged = dtypes.size(self.job.dtype), self.job.merged_elements
        end = start + len(out) // size
        between = max(start, min(end, merged))
        if start < between:
            self._merge(reader, start, between, out[: (between - start) * size])
        if between < end:
            self._copy(reader, between, end, out[(between - start) * size :])

    @property
    def key(self) -> tuple[object, ...]:
        """The job, and what its random draws depend on."""
        job = self.job
        made = (job.name, job.shape, job.method, job.has_base, job.merged_elements, job.parameters)
        return "made", self.plan.seed, self.plan.rounding, made, [spec.key for spec in self.inputs]

    def needs_torch(self, spec: TensorSpec) -> bool:
        """Return whether torch makes it, or reads what it is made of."""
        return needs_torch(self.plan, self.job, [self.merge] if self.job.merged_elements else [])

    @property
    def merge(self) -> JobMerge:
        """The merge of the job, before any statistic is gathered."""
        return JobMerge(self.plan, self.job, 0, self.offset, self.extent)

    def _merge(self, reader: Reader, start: int, end: int, out: memoryview) -> None:
        merge = reader.remembered(self, lambda: self._prepared(reader))
        ops, size = merge.ops(CPU), dtypes.size(self.job.dtype)
        row = max(1, merge.row)
        length = max(row, BLOCK // row * row)
        room = [memoryview(bytearray(length * dtypes.size(spec.dtype))) for spec in self.inputs]
        # Whole rows are read and computed; what lies outside is not used.
        for first, count in cut(start // row * row, min(-(-end // row) * row, self.job.merged_elements), length):
            chunks = [part[: count * dtypes.size(spec.dtype)] for part, spec in zip(room, self.inputs, strict=True)]
            for chunk, spec in zip(chunks, self.inputs, strict=True):
                spec.fill(reader, first, chunk)
            block = merge.block(ops, chunks)
            begin, last = max(first, start), min(first + count, end)
            wanted = out[(begin - start) * size : (last - start) * size]
            is_whole = len(wanted) == count * size
            target = wanted if is_whole else memoryview(bytearray(count * size))
            ops.merge(merge.merge, block, first, ops.of_bytes(target, self.job.dtype), length)
            if not is_whole:
                wanted[:] = target[(begin - first) * size : (last - first) * size]

    def _prepared(self, reader: Reader) -> JobMerge:
        """Return the merge with its statistics, for which the tensor is read once more for each pass."""
        merge = self.merge
        if merge.request is not None:
            room = (CHUNK + 2 * merge.row) * merge.widest_input
            merge.prepare(WorkerBuffers(CPU, len(self.inputs), room), reader)
        return merge

    def _copy(self, reader: Reader, start: int, end: int, out: memoryview) -> None:
        source, dtype = self.inputs[0], self.job.dtype
        if source.dtype == dtype:
            source.fill(reader, start, out)
            return
        size = dtypes.size(dtype)
        ops = cast_ops(self.plan, self.job)
        for first, count in cut(start, end, BLOCK):
            chunk = memoryview(bytearray(count * dtypes.size(source.dtype)))
            source.fill(reader, first, chunk)
            target = out[(first - start) * size : (first - start + count) * size]
            ops.merge(Cast(), [ops.of_bytes(chunk, source.dtype)], first, ops.of_bytes(target, dtype), count)


def makers(plan: Plan, folder: Path) -> dict[tuple[Path, int], MadeByJob]:
    """Return what makes each tensor of a plan's output, by its file in ``folder`` and where it begins there."""
    made, offset, extent, alone = {}, 0, sum(job.numel for job in plan.jobs), plan.for_workers
    for job in plan.jobs:
        number, begin = plan.layout.place(job.name)
        if job.numel:
            made[folder / plan.layout.files[number].name, begin] = MadeByJob(job.inputs, job, alone, offset, extent)
        offset += job.numel
    return made


def is_in_one_read(plan: Plan) -> bool:
    """Return whether every tensor of a plan's output follows from the same elements of its inputs, on any device."""
    return all(
        not (maker.job.scales or maker.job.scales_of)
        and (not maker.job.merged_elements or _is_in_one_read(maker.merge))
        for maker in makers(plan, Path()).values()
    )


def _is_in_one_read(merge: JobMerge) -> bool:
    return merge.request is None and not merge.depends_on_device


def why_not_made(plan: Plan, device: str = CPU) -> str:
    """Return why tensors of a plan's output can't be made while they are read on the CPU; empty where they can.

    ``device`` is the kind that they were made on.
    """
    for maker in makers(plan, Path()).values():
        if maker.job.scales or maker.job.scales_of:
            return "is written in FP8"
        merge = maker.merge if maker.job.merged_elements else None
        if merge is not None and merge.group is not None:
            return "has thresholds or coefficients that span several tensors"
        if merge is not None and device != CPU and not _is_in_one_read(merge):
            return f"was made on another kind of device, {device}, and its last bits depend on that"
    return ""


def reading(plan: Plan, results: Mapping[tuple[Path, int], MadeByJob]) -> Plan:
    """Return a plan that makes some tensors while it reads them, instead of reading files that are not there.

    ``results`` are from ``makers``. Raises NotMadeError where one of them is read in a way that nothing is known of.
    """
    files = {path for path, _ in results}

    def made(spec: TensorSpec) -> TensorSpec:
        if spec.is_plain:
            if spec.file not in files or not spec.numel:
                return spec
            return replace(spec, encoding=results[spec.file, spec.offset])
        within = {part.name: getattr(spec.encoding, part.name) for part in fields(spec.encoding)}  # type: ignore[arg-type]
        changed = {name: _made_within(value, made) for name, value in within.items()}
        changed = {name: value for name, value in changed.items() if value is not within[name]}
        if spec.file in files and not changed:
            raise NotMadeError(f"{spec.name} is read as {type(spec.encoding).__name__}")
        return replace(spec, encoding=replace(spec.encoding, **changed)) if changed else spec  # type: ignore[type-var]

    return replace(
        plan, jobs=tuple(replace(job, inputs=tuple([made(spec) for spec in job.inputs])) for job in plan.jobs)
    )


def _made_within(value: Any, made: Any) -> Any:
    """Return what an encoding holds with tensors as ``made`` gives them; the same object where nothing changes."""
    if isinstance(value, TensorSpec):
        return made(value)
    if isinstance(value, tuple) and any(isinstance(part, TensorSpec) for part in value):
        parts = tuple(made(part) if isinstance(part, TensorSpec) else part for part in value)
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    return value


def reads_in_one_pass(plan: Plan) -> bool:
    """Return whether a plan reads once what it makes while it reads it."""
    offset, extent = 0, sum(job.numel for job in plan.jobs)
    for job in plan.jobs:
        reads_made = job.merged_elements and any(_is_made(spec) for spec in job.inputs)
        if reads_made and JobMerge(plan, job, 0, offset, extent).request is not None:
            return False
        offset += job.numel
    return True


def _is_made(spec: TensorSpec) -> bool:
    return isinstance(spec.encoding, Made) or any(_is_made(part) for part in _parts(spec))


def _parts(spec: TensorSpec) -> Iterator[TensorSpec]:
    for part in fields(spec.encoding):  # type: ignore[arg-type]
        value = getattr(spec.encoding, part.name)
        yield from (each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, TensorSpec))
