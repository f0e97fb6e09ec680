"""The pass over a plan's spans: read ▸ compute ▸ write chunk by chunk, and journal what is done.

A task is some spans, and all that a worker has to know of them. A worker makes the merges of its tasks itself; only
those whose statistics are work for several workers are made and kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby, zip_longest
from typing import Any, TypeVar

from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.checkpoint.encodings.gathered import part_of
from mergekit_lite.checkpoint.extents import extents, is_elsewhere
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.deferred import np
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.news import MADE
from mergekit_lite.engine.pool import Pool, Workers, tuned_process
from mergekit_lite.engine.sink import Sink
from mergekit_lite.engine.span_writer import SpanWriter, chunk_of
from mergekit_lite.engine.tensor_merge import JobMerge, Section, Sums, add_to, gather, needed, needs_torch
from mergekit_lite.engine.tiling import Span, joined_elements, longest_chunk, spans
from mergekit_lite.methods.contract import Totals
from mergekit_lite.output.by_workers import Parcel, RemoteFile, RemoteFiles, Written
from mergekit_lite.output.journal import Record
from mergekit_lite.output.remote_workspace import RemoteWorkspace
from mergekit_lite.output.upload import Uploaded
from mergekit_lite.planning import Plan

Progress = Callable[[int, int], None]
Part = TypeVar("Part")  # of a tensor: a span or a section


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
        self.only = only
        self.writer = SpanWriter(plan, workers.block)
        self.progress = progress
        self.extent = sum(job.numel for job in plan.jobs)
        self.most = joined_elements(self.extent)  # that small spans or sections are joined to
        self.needs_torch = not self.on_cpu  # else if a job does: workers that are forked then share one import
        self.needs_numpy = False
        self.shared: dict[tuple[int, int], JobMerge] = {}  # by job and output: merges whose sums several workers gather
        rows = self._look_at_merges()
        if only is not None:
            self.shared = needed(self.shared, only)
        self.bytes_in_all = sum(_cost(span) for of_job in spans(plan, only) for span in of_job)
        self.bytes_done = self.bytes_ahead = 0
        chunk = max((chunk_of(job, self.writer.chunk) for job in plan.jobs), default=0)
        room = max(chunk, longest_chunk(plan)) + 2 * rows
        nbytes = room * plan.widest_element
        processes = workers.processes and not any(spec.encoding.is_shared for job in plan.jobs for spec in job.inputs)
        self.pool = Pool(
            workers.count, workers.devices, plan.most_inputs, nbytes, processes=processes, crew=workers.crew
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker elsewhere needs to carry out spans."""
        return vars(self) | {"plan": self.plan.for_workers, "progress": None, "only": None}

    def run(self) -> None:
        """Gather the statistics that span several tensors, then carry the spans out."""
        with tuned_process(self.needs_torch and self.pool.crew is None):
            if self.needs_numpy:
                np.empty(0)  # imported here, and not by each worker
            gather(list(self.shared.values()), self._sums)
            if any(
                isinstance(workspace, RemoteWorkspace) and workspace.by_file for workspace in self.workspaces.values()
            ):
                self._make_files()
                return
            for nbytes, records, written in self.pool.run(
                self._tasks(), self._carry_out, self.expect, size=_cost_of_task
            ):
                for output, of_output in written:
                    self._remote(output).write_all(of_output)
                for output, record in records:
                    self.workspaces[output].done(record)
                self._advance(nbytes)

    def _make_files(self) -> None:
        """Have workers elsewhere make files whole, and send them."""
        of_file: dict[int, list[Span]] = {number: [] for number in range(len(self.plan.layout.files))}
        for of_job in spans(self.plan, self.only):
            job = of_job[0].job if of_job else None
            # Codes whose scales begin the next file are made with both files.
            for number in {self.plan.layout.place(name)[0] for name in (job.name, job.scales) if name} if job else ():
                of_file[number] += by_themselves(of_job)
        settled = set.intersection(*({*self._remote(output).settled} for output in self.workspaces))
        tasks = [task for task in of_file.items() if task[0] not in settled]

        def expect(reader: Reader, task: tuple[int, list[Span]]) -> None:
            # Tensor by tensor: what is read again for statistics is so before the next one is read.
            for _, of_job in groupby(task[1], key=lambda span: span.index):
                self.expect(reader, list(of_job))

        if self.pool.crew is not None:
            self.pool.crew.on_news = self._show
        for nbytes, made in self.pool.run(tasks, self._make_file, expect, size=lambda task: _cost_of_task(task[1])):
            for output, number, uploaded, records in made:
                self._remote(output).file_done(number, uploaded, records)
            self._advance(nbytes)

    def _remote(self, output: int) -> RemoteWorkspace:
        workspace = self.workspaces[output]
        assert isinstance(workspace, RemoteWorkspace)
        return workspace

    def _look_at_merges(self) -> int:
        """Keep the merges that several workers share, find out whether torch is needed, and return the longest row.

        All others are let go at once: there may be very many.
        """
        longest = offset = 0
        for index, job in enumerate(self.plan.jobs):
            if job.scales_of:  # made with their codes
                offset += job.numel
                continue
            outputs = self.workspaces if job.merged_elements else ()
            merges = {output: JobMerge(self.plan, job, output, offset, self.extent) for output in outputs}
            longest = max(longest, *(merge.row for merge in merges.values()), 0)
            self.needs_numpy |= any(merge.request is not None for merge in merges.values())
            self.needs_numpy |= not all(spec.is_plain for spec in job.inputs)
            self.shared |= {(index, output): merge for output, merge in merges.items() if merge.is_shared}
            if not self.needs_torch and (self.only is None or index in self.only):
                self.needs_torch = needs_torch(self.plan, job, list(merges.values()))
            offset += job.numel
        return longest

    def _merge(self, span: Span, output: int) -> JobMerge:
        """Return the merge of a span's job for one output."""
        shared = self.shared.get((span.index, output))
        return shared or JobMerge(self.plan, span.job, output, span.offset, self.extent)

    def _tasks(self) -> Iterator[list[Span]]:
        """Yield the spans that one worker takes at a time: all of a tensor where it has statistics to gather."""
        of_file: dict[int, list[list[Span]]] = {}
        for of_job in spans(self.plan, self.only):
            for unit in [of_job] if self._gathers(of_job) else [[alone] for alone in by_themselves(of_job)]:
                of_file.setdefault(self.plan.layout.place(unit[0].job.name)[0], []).append(unit)
        tasks = [list(joined(units, self.most, lambda span: span.end - span.begin)) for units in of_file.values()]
        # A file that is uploaded while it is made can't be gone on with until it is complete: one after the other.
        uploaded = any(isinstance(workspace, RemoteWorkspace) for workspace in self.workspaces.values())
        return by_turns(tasks, 1 if uploaded else self.pool.workers)

    def _gathers(self, of_job: Sequence[Span]) -> bool:
        """Return whether a job of several spans has statistics that one worker gathers."""
        several = len(of_job) > 1 and of_job[0].merged
        return several and any(self._merge(of_job[0], output).request is not None for output in self.workspaces)

    def _sums(self, wanted: Sequence[Section]) -> dict[Section, Totals]:
        """Return the requested sums over some sections, as ``gather`` wants them; progress counts what is read."""
        merges = list(self.shared.values())
        first: dict[str | int, Section] = {}  # by group, or by merge where it has none
        firsts = {section: first.setdefault(merges[section[0]].group or section[0], section) for section in wanted}

        def add(buffers: WorkerBuffers, reader: Reader, task: Sequence[Section]) -> tuple[int, Sums]:
            sums = Sums()
            for number, begin, end in task:
                part = merges[number].sum(buffers, reader, begin, end)
                add_to(sums, part, (number, begin, end), firsts[number, begin, end])
            return cost(task), sums

        def cost(task: Sequence[Section]) -> int:
            return sum(merges[number].bytes_to_sum(begin, end) for number, begin, end in task)

        self.bytes_in_all += cost(wanted)
        sums: dict[Section, Totals] = {}
        tasks = joined([[section] for section in wanted], self.most, lambda section: section[2] - section[1])

        def expect(reader: Reader, task: Sequence[Section]) -> None:
            expect_elements(reader, [(merges[number].job.inputs, begin, end) for number, begin, end in task])

        for nbytes, of_task in self.pool.run(tasks, add, expect, size=cost):
            for section, part in of_task.items():
                add_to(sums, part, section, firsts[section])
            self._advance(nbytes)
        return sums

    def expect(self, reader: Reader, task: Sequence[Span]) -> None:
        """Tell a reader what the spans of a task will read, and whether they do so again for their statistics."""
        if not any(map(is_elsewhere, (spec for span in task for spec in span.job.inputs))):
            return
        inputs = [(span.job.inputs if span.merged else span.job.inputs[:1], span.begin, span.end) for span in task]
        again = any(
            self._merge(span, output).request is not None for span in task if span.merged for output in self.workspaces
        )
        expect_elements(reader, inputs, again=again)

    def _advance(self, nbytes: int) -> None:
        self.bytes_done += nbytes
        self._show(max(0, self.bytes_ahead - nbytes))

    def _show(self, ahead: int) -> None:
        """Say what is done, with what is made of tasks that are not done yet."""
        self.bytes_ahead = ahead
        if self.progress is not None:
            self.progress(self.bytes_done + ahead, self.bytes_in_all)

    def _carry_out(
        self, buffers: WorkerBuffers, reader: Reader, task: Sequence[Span]
    ) -> tuple[int, list[tuple[int, Record]], list[tuple[int, list[Written]]]]:
        """Make what is missing of some spans.

        Return their cost, and by output what to journal, and what the command has to write.
        """
        records = self._made(buffers, reader, task, self.workspaces)
        parcels = [(output, sink.taken()) for output, sink in self.workspaces.items() if isinstance(sink, Parcel)]
        return _cost_of_task(task), records, parcels

    def _make_file(
        self, buffers: WorkerBuffers, reader: Reader, task: tuple[int, list[Span]]
    ) -> tuple[int, list[tuple[int, int, Uploaded, list[Record]]]]:
        """Make a file of each output that has none yet, and return its cost and what the store has, with the records.

        This is done where the workspaces are those that stand for them.
        """
        number, of_file = task
        with ExitStack() as stack:
            sinks: dict[int, RemoteFile] = {}
            for output, files in self.workspaces.items():
                assert isinstance(files, RemoteFiles)
                if number not in files.settled:
                    sinks[output] = stack.enter_context(files.begun(number))
            records = self._made(buffers, reader, of_file, sinks)
            return _cost_of_task(of_file), [
                (output, number, sink.complete(), [record for of, record in records if of == output])
                for output, sink in sinks.items()
            ]

    def _made(
        self, buffers: WorkerBuffers, reader: Reader, task: Sequence[Span], sinks: Mapping[int, Sink]
    ) -> list[tuple[int, Record]]:
        """Make what is missing of some spans, and return what to journal, by output."""
        records: list[tuple[int, Record]] = []
        of_job: dict[int, JobMerge] = {}  # by output: once for all spans of a tensor, which follow each other
        last: int | None = None
        for span in task:
            if span.index != last:
                of_job, last = {}, span.index  # the sums of those before take megabytes each
            missing = {
                output: workspace
                for output, workspace in sinks.items()
                if not self.writer.is_made(buffers, workspace, span)
            }
            for output in missing if span.merged else ():
                if output not in of_job:
                    merge = self._merge(span, output)
                    for earlier in of_job.values():
                        merge.follow(earlier)
                    of_job[output] = merge
                    merge.prepare(buffers, reader)
            if missing:
                of_span = {output: of_job[output] for output in missing if span.merged}
                records += self.writer.make(buffers, reader, span, of_span, missing, lambda: self.pool.stopped)
            MADE.add(_cost(span))
        return records


def expect_elements(
    reader: Reader, ranges: Iterable[tuple[Sequence[TensorSpec], int, int]], *, again: bool = False
) -> None:
    """Tell a reader which elements it will read: ranges of some tensors each, (tensors, begin, end), side by side."""
    reader.expect(
        (
            (*extent, turn)
            for turn, (specs, begin, end) in enumerate(ranges)
            for spec in specs
            if is_elsewhere(spec)
            for extent in extents(spec, begin, min(end, spec.numel))
        ),
        again=again,
    )


def joined(units: Iterable[list[Part]], most: int, elements: Callable[[Part], int]) -> Iterator[list[Part]]:
    """Yield units of spans or sections joined to tasks of at most ``most`` elements; a larger unit is one by itself."""
    task: list[Part] = []
    in_task = 0
    for unit in units:
        more = sum(map(elements, unit))
        if task and in_task + more > most:
            yield task
            task, in_task = [], 0
        task += unit
        in_task += more
    yield task


def by_turns(tasks: Sequence[Sequence[list[Span]]], files: int) -> Iterator[list[Span]]:
    """Yield the tasks of each output file, alternating between as many files as there are workers.

    Two writers of one file wait for each other in the kernel; side by side in two files they don't. Each file is
    still written from its begin to its end.
    """
    for first in range(0, len(tasks), files):
        for turn in zip_longest(*tasks[first : first + files]):
            yield from (task for task in turn if task is not None)


def by_themselves(of_job: Sequence[Span]) -> Iterator[Span]:
    """Yield the spans of a job, each with no more of its inputs' descriptions than it needs: they travel with it."""
    for span in of_job:
        inputs = tuple([part_of(spec, span.begin, span.end) for spec in span.job.inputs])
        is_same = all(part is spec for part, spec in zip(inputs, span.job.inputs, strict=True))
        yield span if is_same else replace(span, job=replace(span.job, inputs=inputs))


def _cost_of_task(task: Sequence[Span]) -> int:
    return sum(map(_cost, task))


def _cost(span: Span) -> int:
    """Return the bytes read for a span: what progress is measured in."""
    sources = span.job.inputs if span.merged else span.job.inputs[:1]
    return sum(spec.stored_bytes(span.end - span.begin) for spec in sources)
