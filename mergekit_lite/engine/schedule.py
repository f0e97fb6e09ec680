"""The pass over a plan's spans: read ▸ compute ▸ write chunk by chunk, and journal what is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import zip_longest

from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.pool import Pool, tuned_process
from mergekit_lite.engine.sink import Sink
from mergekit_lite.engine.span_writer import SpanWriter
from mergekit_lite.engine.tensor_merge import Section, TensorMerge, gather, needed, ways, without_torch
from mergekit_lite.engine.tiling import CHUNK, Span, spans
from mergekit_lite.methods.passes import Totals
from mergekit_lite.output.journal import Record
from mergekit_lite.planning import Plan

Progress = Callable[[int, int], None]


class Schedule:
    """One pass over a plan's spans for the variants that are still to be made."""

    def __init__(
        self,
        plan: Plan,
        workspaces: Mapping[int, Sink],
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
        self.maker = SpanWriter(plan, device, block)
        self.progress = progress
        self.spans = [span for span in spans(plan) if only is None or span.index in only]
        self.ways = ways(plan, list(workspaces))
        if only is not None:
            self.ways = needed(self.ways, only)
        self.bytes_in_all = sum(_cost(span) for span in self.spans)
        self.bytes_done = 0
        rows = max((way.row for way in self.ways.values()), default=0)
        room = max(self.maker.chunk, CHUNK) + 2 * rows
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
        of_job: dict[int, list[TensorMerge]] = {span.index: [] for span in self.spans}
        for (index, _), way in self.ways.items():
            of_job.setdefault(index, []).append(way)
        return self.device != CPU or not all(without_torch(self.plan.jobs[index], of_job[index]) for index in of_job)

    def _tasks(self) -> list[list[Span]]:
        """The spans that one worker takes at a time: those of a tensor together where it has statistics to gather."""
        waiting = {index for (index, _), way in self.ways.items() if way.passes.request is not None}
        tasks: dict[tuple[int, int], list[Span]] = {}
        for span in by_turns(self.plan, self.spans, self.pool.workers):
            tasks.setdefault((span.index, 0 if span.index in waiting else span.begin), []).append(span)
        return list(tasks.values())

    def _sums(self, wanted: Sequence[Section]) -> dict[Section, Totals]:
        """The requested sums over some sections of the ways. Their reading is added to what progress counts."""
        ways = list(self.ways.values())
        sums: dict[Section, Totals] = {}

        def add(buffers: WorkerBuffers, reader: Reader, section: Section) -> tuple[Section, Totals]:
            number, begin, end = section
            return section, ways[number].sum(buffers, reader, begin, end)

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
        self, buffers: WorkerBuffers, reader: Reader, spans: Sequence[Span]
    ) -> tuple[Sequence[Span], list[tuple[int, Record]]]:
        """Make what is missing of some spans: what to journal, by variant."""
        records: list[tuple[int, Record]] = []
        for span in spans:
            missing = {
                v: workspace
                for v, workspace in self.workspaces.items()
                if not self.maker.is_made(buffers, workspace, span)
            }
            if missing:
                ways = {v: self.ways[span.index, v] for v in missing} if span.merged else {}
                for way in ways.values():
                    way.prepare(buffers, reader)
                records += self.maker.make(buffers, reader, span, ways, missing, lambda: self.pool.stopped)
        return spans, records


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


def _cost(span: Span) -> int:
    """Bytes read for a span: what progress is measured in."""
    sources = span.job.inputs if span.merged else span.job.inputs[:1]
    return sum(spec.stored_bytes(span.end - span.begin) for spec in sources)
