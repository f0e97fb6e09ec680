"""The workers: each takes spans from the common list until none is left, one fails, or the run is interrupted."""

from __future__ import annotations

import ctypes
import os
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest

import torch
import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.engine.lane import Lane, all_finite, combined, store
from mergekit_lite.engine.spans import CHUNK, Span, cut, observed_grains, observed_share, spans
from mergekit_lite.methods import method_named
from mergekit_lite.output.journal import Record
from mergekit_lite.output.workspace import Workspace
from mergekit_lite.plan import Plan

Progress = Callable[[int, int], None]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class Work:
    """One pass over a plan's spans for the variants that are still to be made."""

    def __init__(
        self,
        plan: Plan,
        workspaces: Mapping[int, Workspace],
        device: torch.device,
        block: int,
        progress: Progress | None,
    ) -> None:
        """Prepare; nothing is read yet."""
        self.plan = plan
        self.workspaces = workspaces
        self.device = device
        self.block = block
        self.chunk = max(block, CHUNK // block * block)
        self.progress = progress
        self.method = method_named(plan.recipe.merge_method)
        self.spans = spans(plan)
        self.share = observed_share(plan)
        self.bytes_in_all = sum(_cost(span) for span in self.spans)
        self.bytes_done = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def run(self, workers: int) -> None:
        """Carry the spans out. Raises what the first failing worker raised."""
        _keep_freed_memory()
        _allow_many_files()
        queue = iter(by_turns(self.plan, self.spans, workers))
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # the lanes are the threads
        try:
            with Reader() as reader:
                pool = [threading.Thread(target=self._lane, args=(reader, queue), daemon=True) for _ in range(workers)]
                for worker in pool:
                    worker.start()
                try:
                    for worker in pool:
                        worker.join()
                finally:  # on Ctrl-C the lanes finish their block before the files under them are closed
                    self._stop.set()
                    for worker in pool:
                        worker.join()
        finally:
            torch.set_num_threads(before)
        if self._failure is not None:
            raise self._failure

    def _lane(self, reader: Reader, queue: Iterator[Span]) -> None:
        try:
            lane = Lane(self.device, self.plan.most_inputs, self.chunk * self.plan.widest_element)
            with torch.inference_mode(), lane.working():
                while not self._stop.is_set():
                    with self._lock:
                        span = next(queue, None)
                    if span is None:
                        return
                    self._span(lane, reader, span)
                    with self._lock:
                        self.bytes_done += _cost(span)
                        if self.progress is not None:
                            self.progress(self.bytes_done, self.bytes_in_all)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()

    def _span(self, lane: Lane, reader: Reader, span: Span) -> None:
        missing = {
            v: workspace for v, workspace in self.workspaces.items() if not self._is_written(lane, workspace, span)
        }
        if not missing:
            return
        sources = span.job.inputs if span.merged else span.job.inputs[:1]
        read_digests = [xxhash.xxh3_128() for _ in sources]
        made = {v: Made() for v in missing}
        for start, count in cut(span.begin, span.end, self.chunk):
            if self._stop.is_set():
                return
            inputs = [lane.read(reader, number, spec, start, count) for number, spec in enumerate(sources)]
            for digest, chunk in zip(read_digests, inputs, strict=True):
                digest.update(bytes_of(chunk))
            for v, workspace in missing.items():
                out = self._chunk(lane, span, v, start, inputs, made[v])
                data = bytes_of(out)
                workspace.write(span.job.name, start * out.element_size(), data)
                made[v].digest.update(data)
        read = [digest.hexdigest() for digest in read_digests]
        for v, workspace in missing.items():
            done = made[v]
            workspace.done(Record(span.index, span.begin, read, done.digest.hexdigest(), done.sums, sorted(done.bad)))

    def _chunk(
        self, lane: Lane, span: Span, variant: int, start: int, inputs: list[torch.Tensor], made: Made
    ) -> torch.Tensor:
        """Compute one chunk of one variant, block by block. Returns it on the host, valid until the next chunk."""
        recipe, job = self.plan.recipe, span.job
        method = self.method if span.merged else None
        parameters = job.parameters[variant] if span.merged else {}
        out = lane.output(job.dtype, inputs[0].numel())
        for first, count in cut(0, out.numel(), self.block):
            place = slice(first, first + count)
            blocks = [lane.fetch(chunk[place]) for chunk in inputs]
            result = combined(method, parameters, blocks, out.dtype, direct=recipe.rounding == "nearest")
            store(result, out[place], recipe.rounding, recipe.seed, job.name, start + first)
            if method is not None and method.observe is not None:
                written = lane.fetch(out[place])
                for grain in observed_grains(span.begin, start + first, count, self.share):
                    made.add(
                        method.observe(written[grain], *(block[grain] for block in blocks)), grain.stop - grain.start
                    )
        lane.wait()
        if not all_finite(out):
            made.bad |= {number for number, chunk in enumerate(inputs) if not all_finite(chunk)} or {-1}
        return out

    def _is_written(self, lane: Lane, workspace: Workspace, span: Span) -> bool:
        """Whether an earlier run wrote this span and its bytes are still what it wrote."""
        record = workspace.journal.records.get((span.index, span.begin))
        if record is None:
            return False
        digest = xxhash.xxh3_128()
        size = dtypes.size(span.job.dtype)
        for start, count in cut(span.begin, span.end, self.chunk):
            data = lane.scratch(count * size)
            if not workspace.read(span.job.name, start * size, data):
                return False
            digest.update(data)
        return digest.hexdigest() == record.output


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


def _cost(span: Span) -> int:
    """Bytes read for a span: what progress is measured in."""
    sources = span.job.inputs if span.merged else span.job.inputs[:1]
    return sum((span.end - span.begin) * dtypes.size(spec.stored_dtype) for spec in sources)


def _keep_freed_memory() -> None:
    """Let glibc reuse the temporaries of the arithmetic.

    By default it gives blocks over 128 KiB back to the system at once, and getting them again costs a page fault for
    every 4 KiB: with plain tensor expressions that is three quarters of the time (measured: 2.69 against 0.72 ns an
    element).
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _allow_many_files() -> None:
    """Raise the limit of open files to what the system allows: many models of many shards are open at once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
