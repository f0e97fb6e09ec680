"""One span made: read ▸ compute ▸ write, chunk by chunk.

Chunks are bytes, as they are stored and as they will be. A chunk is copied, merged by a kernel, or given to torch: the
tensors it sees are views of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.deferred import torch
from mergekit_lite.engine.buffers import CPU, WorkerBuffers, all_finite, store
from mergekit_lite.engine.sink import Sink
from mergekit_lite.engine.tensor_merge import TensorMerge
from mergekit_lite.engine.tiling import CHUNK, Span, cut, observed_grains, observed_share
from mergekit_lite.methods.passes import Kernel
from mergekit_lite.ops import c_ops
from mergekit_lite.output.journal import Record
from mergekit_lite.planning import Plan


class SpanWriter:
    """Makes the spans of a plan.

    Attributes:
        chunk: elements read and written at once.
    """

    def __init__(self, plan: Plan, device: str, block: int) -> None:
        """``block`` elements are computed at once by torch."""
        self.plan = plan
        self.device = device
        self.block = block
        self.chunk = max(block, CHUNK // block * block)
        self.share = observed_share(plan)

    def is_made(self, buffers: WorkerBuffers, destination: Sink, span: Span) -> bool:
        """Whether an earlier run wrote this span and its bytes are still what it wrote."""
        record = destination.record(span.index, span.begin)
        if record is None:
            return False
        digest = xxhash.xxh3_128()
        size = dtypes.size(span.job.dtype)
        for start, count in cut(span.begin, span.end, self.chunk):
            data = buffers.output(count * size)
            if not destination.read(span.job.name, start * size, data):
                return False
            digest.update(data)
        return digest.hexdigest() == record.output

    def make(
        self,
        buffers: WorkerBuffers,
        reader: Reader,
        span: Span,
        ways: Mapping[int, TensorMerge],
        destinations: Mapping[int, Sink],
        stopped: Callable[[], bool],
    ) -> list[tuple[int, Record]]:
        """Make a span.

        Args:
            lane, reader: to do it with.
            span: what to make.
            ways: by variant how a merged span is merged, with all statistics there.
            destinations: by variant where it goes.
            stopped: whether to end now.

        Returns:
            What to journal, by variant; nothing where it was stopped.
        """
        job = span.job
        row = max((way.row for way in ways.values()), default=0) or 1
        sources = job.inputs if span.merged else job.inputs[:1]
        size = dtypes.size(job.dtype)
        read_digests = [xxhash.xxh3_128() for _ in sources]
        made = {v: _Made() for v in destinations}
        for start, count in cut(span.begin, span.end, self.chunk):
            if stopped():
                return []
            first = start // row * row  # whole rows are read and computed; what lies outside the span is not used
            last = min(-(-(start + count) // row) * row, job.numel)
            wanted = slice(start - first, start - first + count)
            skew = next(iter(destinations.values())).skew(job.name, first * size)  # of all: they have one layout
            inputs = [
                buffers.read(reader, number, spec, first, last - first, skew if is_copied(span) else 0)
                for number, spec in enumerate(sources)
            ]
            for digest, chunk, spec in zip(read_digests, inputs, sources, strict=True):
                digest.update(_part(chunk, wanted, dtypes.size(spec.dtype)))
            for v, destination in destinations.items():
                out = buffers.output((last - first) * size, skew) if not is_copied(span) else inputs[0]
                self._fill(out, buffers, span, ways.get(v), first, inputs, made[v])
                data = _part(out, wanted, size)
                destination.write(job.name, start * size, data)
                made[v].digest.update(data)
        read = [digest.hexdigest() for digest in read_digests]
        records: list[tuple[int, Record]] = []
        for v, done in made.items():
            output, bad = done.digest.hexdigest(), sorted(done.bad)
            coefficients = ways[v].coefficients if v in ways and span.begin == 0 else ()
            records.append((v, Record(span.index, span.begin, read, output, done.sums, bad, coefficients)))
        return records

    def kernel(self, way: TensorMerge) -> Kernel | None:
        """What merges without torch, where there is such."""
        return way.kernel if self.device == CPU else None

    def _fill(
        self,
        out: memoryview,
        buffers: WorkerBuffers,
        span: Span,
        way: TensorMerge | None,
        start: int,
        inputs: Sequence[memoryview],
        made: _Made,
    ) -> None:
        """Make one chunk of one variant."""
        kinds = [spec.dtype for spec in span.job.inputs[: len(inputs)]]
        if way is not None and (kernel := self.kernel(way)) is not None:
            self._by_kernel(kernel, c_ops.run(out, span.job.dtype), span, way, start, way.runs(inputs), made)
        elif not is_copied(span):
            with torch.inference_mode():
                tensors = way.tensors(inputs) if way is not None else [tensor_of(inputs[0], kinds[0])]
                self._by_torch(tensor_of(out, span.job.dtype), buffers, span, way, start, tensors, made)
        if not all_finite(out, span.job.dtype):
            found = {number for number, kind in enumerate(kinds) if not all_finite(inputs[number], kind)}
            made.bad |= found or {-1}

    def _by_kernel(
        self,
        kernel: Kernel,
        out: c_ops.Run,
        span: Span,
        way: TensorMerge,
        start: int,
        inputs: list[c_ops.Run],
        made: _Made,
    ) -> None:
        """Merge a chunk at once: tile by tile it stays in the cache as well as a block."""
        kernel(inputs, start, out)
        if (observed := way.method.observed) is not None:
            for grain in observed_grains(span.begin, start, out.count, self.share):
                sums = observed.by_kernel(out.part(grain), [run.part(grain) for run in inputs])
                made.add(sums, grain.stop - grain.start)

    def _by_torch(
        self,
        out: torch.Tensor,
        buffers: WorkerBuffers,
        span: Span,
        way: TensorMerge | None,
        start: int,
        inputs: list[torch.Tensor],
        made: _Made,
    ) -> None:
        """Compute a chunk block by block."""
        plan = self.plan
        observed = way.method.observed if way is not None else None
        row = max(1, way.row if way is not None else 1)
        for first, count in cut(0, out.numel(), max(row, self.block // row * row)):
            place = slice(first, first + count)
            block = [buffers.fetch(chunk[place]) for chunk in inputs]
            result = block[0] if way is None else way.combine(block, start + first)
            store(result, out[place], plan.rounding, plan.seed, span.job.name, start + first)
            if observed is not None:
                written = buffers.fetch(out[place])
                for grain in observed_grains(span.begin, start + first, count, self.share):
                    sums = observed.by_torch(written[grain], [tensor[grain] for tensor in block])
                    made.add(sums, grain.stop - grain.start)
        buffers.wait()


class _Made:
    """What is known of a span of one variant when it is written: digest, observed sums, inputs that weren't finite."""

    def __init__(self) -> None:
        """Nothing made yet."""
        self.digest = xxhash.xxh3_128()
        self.sums: list[float] = []
        self.bad: set[int] = set()

    def add(self, observed: tuple[float, ...], elements: int) -> None:
        """Add what the method observed in one grain; the last sum counts the elements looked at."""
        columns = (*observed, float(elements))
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(columns), columns, strict=True)]


def is_copied(span: Span) -> bool:
    """Whether its bytes are those of the input."""
    return not span.merged and span.job.inputs[0].dtype == span.job.dtype


def _part(chunk: memoryview, elements: slice, size: int) -> memoryview:
    return chunk[elements.start * size : elements.stop * size]
