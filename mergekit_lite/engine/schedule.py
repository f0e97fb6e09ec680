"""The pass over a plan's spans: read ▸ compute ▸ write chunk by chunk, and journal what is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import zip_longest

from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.pool import Pool, Workers, tuned_process
from mergekit_lite.engine.sink import Sink
from mergekit_lite.engine.span_writer import SpanWriter
from mergekit_lite.engine.tensor_merge import JobMerge, Section, gather, merges_of, needed, needs_torch
from mergekit_lite.engine.tiling import CHUNK, Span, spans
from mergekit_lite.methods.contract import Totals
from mergekit_lite.output.journal import Record
from mergekit_lite.planning import Plan

Progress = Callable[[int, int], None]


class Schedule:
    """One pass over a plan's spans for the outputs that are still to be made."""

    def __init__(
        self,
        plan: Plan,
        workspaces: Mapping[int, Sink],
        workers: Workers,
        progress: Progress | None,
        only: Collection[int] | None = None,
    ) -> None:
        """Prepare; nothing is read yet. ``only`` are the indices of the jobs to do, by default all."""
        self.plan = plan
        self.workspaces = workspaces
        self.on_cpu = CPU in workers.devices
        self.writer = SpanWriter(plan, workers.block)
        self.progress = progress
        self.spans = [span for span in spans(plan) if only is None or span.index in only]
        self.merges = merges_of(plan, workspaces.keys())
        if only is not None:
            self.merges = needed(self.merges, only)
        self.bytes_in_all = sum(_cost(span) for span in self.spans)
        self.bytes_done = 0
        rows = max((merge.row for merge in self.merges.values()), default=0)
        room = max(self.writer.chunk, CHUNK) + 2 * rows
        nbytes = room * plan.widest_element
        self.pool = Pool(workers.count, workers.devices, plan.most_inputs, nbytes, processes=workers.processes)

    def run(self) -> None:
        """Gather the statistics that span several tensors, then carry the spans out."""
        with tuned_process(self.needs_torch):
            gather(list(self.merges.values()), self._sums)
            for done, records in self.pool.run(self._tasks(), self._carry_out):
                for output, record in records:
                    self.workspaces[output].done(record)
                self._advance(sum(map(_cost, done)))

    @property
    def needs_torch(self) -> bool:
        """Whether torch has anything to do: workers that are forked then share one import."""
        of_job: dict[int, list[JobMerge]] = {span.index: [] for span in self.spans}
        for (index, _), merge in self.merges.items():
            of_job.setdefault(index, []).append(merge)
        return not self.on_cpu or any(needs_torch(self.plan.jobs[index], of_job[index]) for index in of_job)

    def _tasks(self) -> list[list[Span]]:
        """Return the spans that one worker takes at a time: all of a tensor where it has statistics to gather."""
        waiting = {index for (index, _), merge in self.merges.items() if merge.request is not None}
        tasks: dict[tuple[int, int], list[Span]] = {}
        for span in by_turns(self.plan, self.spans, self.pool.workers):
            tasks.setdefault((span.index, 0 if span.index in waiting else span.begin), []).append(span)
        return list(tasks.values())

    def _sums(self, wanted: Sequence[Section]) -> dict[Section, Totals]:
        """Return the requested sums over some sections. Their reading is added to what progress counts."""
        merges = list(self.merges.values())
        sums: dict[Section, Totals] = {}

        def add(buffers: WorkerBuffers, reader: Reader, section: Section) -> tuple[Section, Totals]:
            number, begin, end = section
            return section, merges[number].sum(buffers, reader, begin, end)

        self.bytes_in_all += sum(merges[number].bytes_to_sum(begin, end) for number, begin, end in wanted)
        for section, part in self.pool.run(wanted, add):
            sums[section] = part
            self._advance(merges[section[0]].bytes_to_sum(*section[1:]))
        return sums

    def _advance(self, nbytes: int) -> None:
        self.bytes_done += nbytes
        if self.progress is not None:
            self.progress(self.bytes_done, self.bytes_in_all)

    def _carry_out(
        self, buffers: WorkerBuffers, reader: Reader, task: Sequence[Span]
    ) -> tuple[Sequence[Span], list[tuple[int, Record]]]:
        """Make what is missing of some spans: these, and what to journal by output."""
        records: list[tuple[int, Record]] = []
        for span in task:
            missing = {
                output: workspace
                for output, workspace in self.workspaces.items()
                if not self.writer.is_made(buffers, workspace, span)
            }
            if missing:
                merges = {output: self.merges[span.index, output] for output in missing} if span.merged else {}
                for merge in merges.values():
                    merge.prepare(buffers, reader)
                records += self.writer.make(buffers, reader, span, merges, missing, lambda: self.pool.stopped)
        return task, records


def by_turns(plan: Plan, spans: Sequence[Span], files: int) -> Iterator[Span]:
    """Yield the spans, alternating between as many output files as there are workers.

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
    """Return the bytes read for a span: what progress is measured in."""
    sources = span.job.inputs if span.merged else span.job.inputs[:1]
    return sum(spec.stored_bytes(span.end - span.begin) for spec in sources)
