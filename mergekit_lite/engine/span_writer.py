"""One span made: read ▸ compute ▸ write, chunk by chunk.

Chunks are bytes, as they are stored and as they will be. A chunk is copied, or merged by a backend, which works on
views of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import xxhash

from mergekit_lite import block_fp8, dtypes
from mergekit_lite.checkpoint.reader import Reader, bytes_of, tensor_of
from mergekit_lite.engine.buffers import WorkerBuffers
from mergekit_lite.engine.devices import kind_of
from mergekit_lite.engine.sink import Sink
from mergekit_lite.engine.tensor_merge import JobMerge, cast_ops
from mergekit_lite.engine.tiling import (
    Span,
    cut,
    longest_chunk,
    observed_grains,
    observed_share,
    quantised_at_once,
)
from mergekit_lite.ops import TensorKind, all_finite, ops_for
from mergekit_lite.ops.operations import NOTHING, Cast, Observed
from mergekit_lite.output.journal import Record
from mergekit_lite.planning import Job, Plan


class SpanWriter:
    """The maker of a plan's spans; ``block`` elements are computed at once, where a backend has temporaries."""

    def __init__(self, plan: Plan, block: int) -> None:
        self.plan = plan
        self.block = block
        self.chunk = max(block, longest_chunk(plan) // block * block)  # elements read and written at once
        self.share = observed_share(plan)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"plan": self.plan.for_workers}

    def is_made(self, buffers: WorkerBuffers, sink: Sink, span: Span) -> bool:
        """Return whether an earlier run wrote this span and its bytes are still what it wrote.

        What another kind of device made counts only where this one would give the same bits: no tensor is of two kinds.
        """
        parts = [(span.index, span.job, span.begin, span.end)]
        if span.scales is not None:
            index, job = span.scales
            parts.append((index, job, 0, job.numel))
        return all(self._is_kept(buffers, sink, *part) for part in parts)

    def _is_kept(self, buffers: WorkerBuffers, sink: Sink, index: int, job: Job, begin: int, end: int) -> bool:
        """Return whether the elements ``begin … end`` of a tensor are still what an earlier run wrote."""
        record = sink.record(index, begin)
        if record is None or record.device not in ("", kind_of(buffers.device)):
            return False
        digest = xxhash.xxh3_128()
        size = dtypes.size(job.dtype)
        for start, count in cut(begin, end, self.chunk):
            data = buffers.output(count * size)
            if not sink.read(job.name, start * size, data):
                return False
            digest.update(data)
        return digest.hexdigest() == record.output

    def make(
        self,
        buffers: WorkerBuffers,
        reader: Reader,
        span: Span,
        merges: Mapping[int, JobMerge],
        sinks: Mapping[int, Sink],
        stopped: Callable[[], bool],
    ) -> list[tuple[int, Record]]:
        """Make a span, and return what to journal, by output; nothing where ``stopped`` says to end now.

        ``sinks`` are where each output goes, ``merges`` how a merged span of it is merged, with all statistics there;
        there are none for a copy.
        """
        job = span.job
        row = max((merge.row for merge in merges.values()), default=0) or 1
        sources = job.inputs if span.merged else job.inputs[:1]
        size = dtypes.size(job.computed_dtype)
        read_digests = [xxhash.xxh3_128() for _ in sources]
        copied = is_copied(span) and not job.scales
        # What is copied is hashed once: the bytes that were read are the very ones that are written.
        results = {output: _Result(read_digests[0] if copied else xxhash.xxh3_128()) for output in sinks}
        for start, count in cut(span.begin, span.end, chunk_of(job, self.chunk)):
            if stopped():
                return []
            first = start // row * row  # whole rows are read and computed; what lies outside the span is not used
            last = min(-(-(start + count) // row) * row, job.numel)
            wanted = slice(start - first, start - first + count)
            skew = next(iter(sinks.values())).skew(job.name, first * size)  # of all: they have one layout
            inputs = [
                buffers.read(reader, number, spec, first, last - first, skew if is_copied(span) else 0)
                for number, spec in enumerate(sources)
            ]
            for digest, chunk, spec in zip(read_digests, inputs, sources, strict=True):
                digest.update(_part(chunk, wanted, dtypes.size(spec.dtype)))
            for output, sink in sinks.items():
                out = inputs[0]
                if not is_copied(span):
                    out = buffers.output((last - first) * size, skew)
                    self._fill(_Chunk(span, first, inputs, out), buffers, merges.get(output), results[output])
                self._look(span, inputs, out, results[output])
                data = _part(out, wanted, size)
                if job.scales:
                    self._write_quantised(span, start, inputs, data, merges.get(output), sink, results[output])
                    continue
                sink.write(job.name, start * size, data)
                if not copied:
                    results[output].digest.update(data)
        read = [digest.hexdigest() for digest in read_digests]
        records: list[tuple[int, Record]] = []
        for output, result in results.items():
            record = Record(span.index, span.begin, read, result.digest.hexdigest(), result.sums, sorted(result.bad))
            record = record._replace(squared_error=result.squared_error)
            if (merge := merges.get(output)) is not None:
                record = record._replace(
                    coefficients=merge.coefficients if span.begin == 0 else (),
                    explained=astuple(merge.explained) if merge.explained and span.begin == 0 else (),
                    device=kind_of(buffers.device) if merge.depends_on_device else "",
                )
            if span.scales is not None:
                scales = Record(
                    span.scales[0], 0, [], result.digest_of_scales.hexdigest(), [], [], device=record.device
                )
                records.append((output, scales))
            records.append((output, record))
        return records

    def _write_quantised(
        self,
        span: Span,
        start: int,
        inputs: Sequence[memoryview],
        results: memoryview,
        merge: JobMerge | None,
        sink: Sink,
        result: _Result,
    ) -> None:
        """Quantise the results of a chunk, write codes and scales, and note their error and what the method observes.

        ``start`` is the index of the chunk's first element.
        """
        job = span.job
        values = tensor_of(results, job.computed_dtype).view(-1, job.shape[-1])
        codes, scales = block_fp8.quantised(values)
        for name, offset, part, digest in (
            (job.name, start, codes, result.digest),
            (job.scales, start // block_fp8.BLOCK * dtypes.size(block_fp8.SCALES), scales, result.digest_of_scales),
        ):
            data = bytes_of(part.view(-1))
            sink.write(name, offset, data)
            digest.update(data)
        written = block_fp8.dequantised(codes, scales)
        result.add_error(*block_fp8.squared_error(values, written))
        if merge is None or merge.method.observed is None:
            return
        kind = TensorKind((*(spec.dtype for spec in job.inputs), job.computed_dtype))
        ops = ops_for(merge.method.observed, kind)
        block = [ops.of_tensor(written.view(-1)), *merge.block(ops, inputs)]
        for grain in observed_grains(span.begin, start, written.numel(), self.share):
            result.add(ops.figures(merge.method.observed, [view[grain] for view in block]), grain.stop - grain.start)

    def _fill(self, chunk: _Chunk, buffers: WorkerBuffers, merge: JobMerge | None, result: _Result) -> None:
        """Merge one chunk of one output, or cast it where there is no merge."""
        job = chunk.span.job
        if merge is None:
            ops = cast_ops(self.plan, job, buffers.device)
            block, row = [ops.of_bytes(chunk.inputs[0], job.inputs[0].dtype)], 1
        else:
            ops = merge.ops(buffers.device)
            block, row = merge.block(ops, chunk.inputs), max(1, merge.row)
        out = ops.of_bytes(chunk.out, job.computed_dtype)
        length = max(row, self.block // row * row)
        observed = NOTHING
        if merge is not None and merge.method.observed is not None and not job.scales:
            elements = len(chunk.out) // dtypes.size(job.dtype)
            grains = observed_grains(chunk.span.begin, chunk.start, elements, self.share)
            observed = Observed(merge.method.observed, list(grains))
        operation = merge.merge if merge is not None else Cast()
        figures = ops.merge(operation, block, chunk.start, out, length, observed)
        for of_grain, grain in zip(figures, observed.grains, strict=True):
            result.add(of_grain, grain.stop - grain.start)
        buffers.wait()

    def _look(self, span: Span, inputs: Sequence[memoryview], out: memoryview, result: _Result) -> None:
        """Note which inputs aren't finite where a chunk of the output isn't; −1 where all inputs are."""
        if not all_finite(out, span.job.computed_dtype):
            sources = [spec.dtype for spec in span.job.inputs[: len(inputs)]]
            bad = {number for number, dtype in enumerate(sources) if not all_finite(inputs[number], dtype)}
            result.bad |= bad or {-1}


@dataclass(frozen=True)
class _Chunk:
    """A chunk on its way: the span, the index of its first element, the bytes that were read, room for the result."""

    span: Span
    start: int
    inputs: Sequence[memoryview]
    out: memoryview


class _Result:
    """What is known of a span of one output when it is written: digest, observed sums, inputs that weren't finite."""

    def __init__(self, digest: xxhash.xxh3_128) -> None:
        self.digest = digest
        self.digest_of_scales = xxhash.xxh3_128()
        self.sums: list[float] = []
        self.squared_error: list[float] = []
        self.bad: set[int] = set()

    def add(self, observed: Sequence[float], elements: int) -> None:
        """Add what the method observed in one grain; the last sum counts the elements looked at."""
        columns = (*observed, float(elements))
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(columns), columns, strict=True)]

    def add_error(self, *squares: float) -> None:
        """Add the sums of squares that ``block_fp8.squared_error`` returns."""
        self.squared_error = [a + b for a, b in zip(self.squared_error or [0.0, 0.0], squares, strict=True)]


def chunk_of(job: Job, length: int) -> int:
    """Return how many elements of a job are read and written at once: ``length``, or whole blocks to quantise."""
    if not job.scales:
        return length
    multiple = quantised_at_once(job)
    return max(multiple, length // multiple * multiple)


def is_copied(span: Span) -> bool:
    """Return whether a span's bytes are those of the input."""
    return not span.merged and span.job.inputs[0].dtype == span.job.dtype


def _part(chunk: memoryview, elements: slice, size: int) -> memoryview:
    return chunk[elements.start * size : elements.stop * size]
