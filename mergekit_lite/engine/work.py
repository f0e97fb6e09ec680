"""The pass over a plan's spans: read ▸ compute ▸ write chunk by chunk, and journal what is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Protocol

import xxhash

from mergekit_lite import dtypes, kernels
from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.deferred import torch
from mergekit_lite.engine.lane import CPU, Lane, all_finite, is_summed, store
from mergekit_lite.engine.pool import Pool, tuned_process
from mergekit_lite.engine.spans import CHUNK, Span, cut, observed_grains, observed_share, spans
from mergekit_lite.engine.ways import Section, Way, gather, needed, ways
from mergekit_lite.methods.passes import Kernel
from mergekit_lite.output.journal import Record
from mergekit_lite.plan import Plan

Progress = Callable[[int, int], None]


class Destination(Protocol):
    """Where the bytes of one variant go: a ``Workspace``, or what only looks at them."""

    def record(self, job: int, begin: int) -> Record | None:
        """What is known of a span that was written earlier."""

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Read back what was written earlier; False where it is not all there."""

    def skew(self, tensor: str, offset: int) -> int:
        """How far behind the begin of a page of memory it would like to be given the byte at this offset."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Take bytes, ``offset`` bytes into a tensor."""

    def done(self, record: Record) -> None:
        """Take note that all of a span's bytes are written."""


class Records:
    """A destination that nothing was written to earlier: keeps the records of what is made, and none of the bytes."""

    def __init__(self) -> None:
        """Nothing made yet."""
        self.made: dict[tuple[int, int], Record] = {}

    def record(self, job: int, begin: int) -> Record | None:
        """Nothing was made earlier."""
        return None

    def read(self, tensor: str, offset: int, buffer: memoryview) -> bool:
        """Nothing can be read back."""
        return False

    def skew(self, tensor: str, offset: int) -> int:
        """Anywhere."""
        return 0

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Bytes are known by their digest, which comes with ``done``."""

    def done(self, record: Record) -> None:
        """Keep what was made of a span."""
        self.made[record.job, record.begin] = record


class Work:
    """One pass over a plan's spans for the variants that are still to be made."""

    def __init__(
        self,
        plan: Plan,
        workspaces: Mapping[int, Destination],
        device: str,
        workers: int,
        block: int,
        progress: Progress | None,
        processes: bool = False,
        only: Collection[int] | None = None,
    ) -> None:
        """Prepare; nothing is read yet. ``only`` are the indices of the jobs to do, by default all."""
        self.plan = plan
        self.workspaces = workspaces
        self.device = device
        self.block = block
        self.chunk = max(block, CHUNK // block * block)
        self.progress = progress
        self.spans = [span for span in spans(plan) if only is None or span.index in only]
        self.share = observed_share(plan)
        self.ways = ways(plan, list(workspaces))
        if only is not None:
            self.ways = needed(self.ways, only)
        self.bytes_in_all = sum(_cost(span) for span in self.spans)
        self.bytes_done = 0
        rows = max((way.row for way in self.ways.values()), default=0)
        room = max(self.chunk, CHUNK) + 2 * rows
        self.pool = Pool(workers, device, plan.most_inputs, room * plan.widest_element, processes=processes)

    def run(self) -> None:
        """Gather the statistics that span several tensors, then carry the spans out."""
        with tuned_process(self.needs_torch):
            gather(list(self.ways.values()), self._sums)
            for spans, records in self.pool.run(self._tasks(), self._carry_out):
                for v, record in records:
                    self.workspaces[v].done(record)
                self._advance(sum(map(_cost, spans)))

    @property
    def needs_torch(self) -> bool:
        """Whether torch has anything to do: workers that are forked then share one import."""
        return not (
            all(way.passes.request is None and self._kernel(way) is not None for way in self.ways.values())
            and all(span.merged or (_is_copied(span) and not is_summed(span.job.dtype)) for span in self.spans)
            and all(spec.as_stored for span in self.spans for spec in span.job.inputs)
        )

    def _tasks(self) -> list[list[Span]]:
        """The spans that one worker takes at a time: those of a tensor together where it has statistics to gather."""
        waiting = {index for (index, _), way in self.ways.items() if way.passes.request is not None}
        tasks: dict[tuple[int, int], list[Span]] = {}
        for span in by_turns(self.plan, self.spans, self.pool.workers):
            tasks.setdefault((span.index, 0 if span.index in waiting else span.begin), []).append(span)
        return list(tasks.values())

    def _sums(self, wanted: Sequence[Section]) -> dict[Section, torch.Tensor]:
        """The requested sums over some sections of the ways. Their reading is added to what progress counts."""
        ways = list(self.ways.values())
        sums: dict[Section, torch.Tensor] = {}

        def add(lane: Lane, reader: Reader, section: Section) -> tuple[Section, torch.Tensor]:
            number, begin, end = section
            return section, ways[number].sum(lane, reader, begin, end)

        self.bytes_in_all += sum(ways[number].bytes_to_sum(begin, end) for number, begin, end in wanted)
        for section, part in self.pool.run(wanted, add):
            sums[section] = part
            self._advance(ways[section[0]].bytes_to_sum(*section[1:]))
        return sums

    def _advance(self, nbytes: int) -> None:
        self.bytes_done += nbytes
        if self.progress is not None:
            self.progress(self.bytes_done, self.bytes_in_all)

    def _carry_out(
        self, lane: Lane, reader: Reader, spans: Sequence[Span]
    ) -> tuple[Sequence[Span], list[tuple[int, Record]]]:
        """Make what is missing of some spans: what to journal, by variant."""
        records: list[tuple[int, Record]] = []
        for span in spans:
            missing = {
                v: workspace for v, workspace in self.workspaces.items() if not self._is_written(lane, workspace, span)
            }
            if missing:
                records += self._make(lane, reader, span, missing)
        return spans, records

    def _make(
        self, lane: Lane, reader: Reader, span: Span, missing: Mapping[int, Destination]
    ) -> list[tuple[int, Record]]:
        job = span.job
        through = {v: self.ways[span.index, v] for v in missing} if span.merged else {}
        for way in through.values():
            way.prepare(lane, reader)
        row = max((way.row for way in through.values()), default=0) or 1
        sources = job.inputs if span.merged else job.inputs[:1]
        size = dtypes.size(job.dtype)
        read_digests = [xxhash.xxh3_128() for _ in sources]
        made = {v: Made() for v in missing}
        for start, count in cut(span.begin, span.end, self.chunk):
            if self.pool.stopped:
                return []
            first = start // row * row  # whole rows are read and computed; what lies outside the span is not used
            last = min(-(-(start + count) // row) * row, job.numel)
            wanted = slice(start - first, start - first + count)
            skew = next(iter(missing.values())).skew(job.name, first * size)  # of all: they have one layout
            inputs = [
                lane.read(reader, number, spec, first, last - first, skew * _is_copied(span))
                for number, spec in enumerate(sources)
            ]
            for digest, chunk, spec in zip(read_digests, inputs, sources, strict=True):
                digest.update(_part(chunk, wanted, dtypes.size(spec.dtype)))
            for v, workspace in missing.items():
                data = _part(self._chunk(lane, span, through.get(v), first, inputs, made[v], skew), wanted, size)
                workspace.write(job.name, start * size, data)
                made[v].digest.update(data)
        read = [digest.hexdigest() for digest in read_digests]
        records: list[tuple[int, Record]] = []
        for v, done in made.items():
            output, bad = done.digest.hexdigest(), sorted(done.bad)
            coefficients = through[v].coefficients if v in through and span.begin == 0 else ()
            records.append((v, Record(span.index, span.begin, read, output, done.sums, bad, coefficients)))
        return records

    def _chunk(
        self, lane: Lane, span: Span, way: Way | None, start: int, inputs: list[memoryview], made: Made, skew: int
    ) -> memoryview:
        """Make one chunk of one variant. Returns its bytes, valid until the next chunk."""
        sources = [spec.dtype for spec in span.job.inputs[: len(inputs)]]
        out = lane.output(len(inputs[0]) // dtypes.size(sources[0]) * dtypes.size(span.job.dtype), skew)
        if _is_copied(span):
            out = inputs[0]
        elif way is not None and (kernel := self._kernel(way)) is not None:
            # tile by tile: a chunk stays in the cache as well as a block
            runs = [kernels.run(chunk, dtype) for chunk, dtype in zip(inputs, sources, strict=True)]
            kernel(way.ordered(runs), start, kernels.run(out, span.job.dtype))
        else:
            with torch.inference_mode():
                tensors = [tensor_of(chunk, dtype) for chunk, dtype in zip(inputs, sources, strict=True)]
                self._by_torch(lane, span, way, start, tensors, tensor_of(out, span.job.dtype), made)
        if not all_finite(out, span.job.dtype):
            found = {number for number, dtype in enumerate(sources) if not all_finite(inputs[number], dtype)}
            made.bad |= found or {-1}
        return out

    def _by_torch(
        self,
        lane: Lane,
        span: Span,
        way: Way | None,
        start: int,
        inputs: list[torch.Tensor],
        out: torch.Tensor,
        made: Made,
    ) -> None:
        """Compute one chunk of one variant, block by block."""
        plan = self.plan
        observe = way.method.observe if way is not None else None
        row = max(1, way.row if way is not None else 1)
        for first, count in cut(0, out.numel(), max(row, self.block // row * row)):
            place = slice(first, first + count)
            blocks = [lane.fetch(chunk[place]) for chunk in inputs]
            result = blocks[0] if way is None else way.combine(blocks, start + first)
            store(result, out[place], plan.rounding, plan.seed, span.job.name, start + first)
            if observe is not None:
                written = lane.fetch(out[place])
                for grain in observed_grains(span.begin, start + first, count, self.share):
                    observed = observe(written[grain], *(block[grain] for block in blocks))
                    made.add(observed, grain.stop - grain.start)
        lane.wait()

    def _kernel(self, way: Way) -> Kernel | None:
        return way.kernel if self.device == CPU else None

    def _is_written(self, lane: Lane, workspace: Destination, span: Span) -> bool:
        """Whether an earlier run wrote this span and its bytes are still what it wrote."""
        record = workspace.record(span.index, span.begin)
        if record is None:
            return False
        digest = xxhash.xxh3_128()
        size = dtypes.size(span.job.dtype)
        for start, count in cut(span.begin, span.end, self.chunk):
            data = lane.output(count * size)
            if not workspace.read(span.job.name, start * size, data):
                return False
            digest.update(data)
        return digest.hexdigest() == record.output


class Made:
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


def by_turns(plan: Plan, spans: Sequence[Span], files: int) -> Iterator[Span]:
    """The spans, alternating between as many output files as there are workers.

    Two writers of one file wait for each other in the kernel; side by side in two files they don't. Each file is
    still written from its begin to its end.
    """
    of_file: dict[int, list[Span]] = {}
    for span in spans:
        of_file.setdefault(plan.layout.places[span.job.name][0], []).append(span)
    groups = list(of_file.values())
    for first in range(0, len(groups), files):
        for turn in zip_longest(*groups[first : first + files]):
            yield from (span for span in turn if span is not None)


def _is_copied(span: Span) -> bool:
    """Whether its bytes are those of the input."""
    return not span.merged and span.job.inputs[0].dtype == span.job.dtype


def _part(chunk: memoryview, elements: slice, size: int) -> memoryview:
    return chunk[elements.start * size : elements.stop * size]


def _cost(span: Span) -> int:
    """Bytes read for a span: what progress is measured in."""
    sources = span.job.inputs if span.merged else span.job.inputs[:1]
    return sum((span.end - span.begin) * dtypes.size(spec.stored_dtype) for spec in sources)
