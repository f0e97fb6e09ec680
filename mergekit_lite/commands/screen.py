"""What the user sees: the plan, the progress, the result. Lines are plain where the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Literal, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mergekit_lite.commands import json_output
from mergekit_lite.commands.groups import Group, groups
from mergekit_lite.commands.prediction import headline, not_predicted, rows
from mergekit_lite.commands.units import size as size
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.fetching import fetches
from mergekit_lite.engine.memory import memory_estimate
from mergekit_lite.engine.pool import writing_workers
from mergekit_lite.engine.remote import spool_bytes
from mergekit_lite.errors import counted
from mergekit_lite.layout import is_single_file
from mergekit_lite.output.companions import companions, what_is_missing
from mergekit_lite.output.remote_workspace import spool_folder
from mergekit_lite.plain_text import plain, plain_line

if TYPE_CHECKING:
    from mergekit_lite.engine.ray_workers import Cluster
    from mergekit_lite.engine.report import Report
    from mergekit_lite.engine.run import Finished
    from mergekit_lite.planning import Plan
    from mergekit_lite.prediction import Prediction

SHOWN = 5
FAR = 0.1  # relative distance of the effective alpha from the one asked for, beyond which the user gets advice
PIPE_WIDTH = 160
SHOWN_NODES = 16
PLAIN_INTERVAL = 10.0  # seconds between lines of progress where there is no terminal


class Screen:
    """Prints results to standard output, all else to standard error; ``quiet``: warnings and errors only."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.out = console(sys.stdout)
        self.err = console(sys.stderr)

    def warn(self, message: str | None) -> None:
        """Print a warning; None is no warning."""
        if message:
            self.err.print(Text.assemble(("Warning:", "yellow bold"), f" {message}"))

    def note(self, text: str) -> None:
        """Print a line beside the results, unless it shall be quiet."""
        if not self.quiet:
            self.err.print(Text(text))

    def plan(
        self,
        plan: Plan,
        threads: int | None,
        devices: Sequence[str] = (CPU,),
        prediction: Prediction | None = None,
    ) -> None:
        """Print the whole plan, with what it takes on some devices, and is predicted to take."""
        files_in_and_out = []
        for source in plan.inputs:
            nbytes = sum(spec.nbytes for spec in source.tensors.values())
            files_in_and_out.append(("input", source.reference, counted(len(source.tensors), "tensor"), size(nbytes)))
        files = counted(len(plan.layout.files), "file")
        files_in_and_out += [("output", str(output), files, size(plan.layout.nbytes)) for output in plan.outputs]
        self.out.print(table(("", "path", "", ">size"), files_in_and_out))
        self.out.print(
            f"\nreads {size(plan.bytes_to_read)}, writes {size(plan.bytes_to_write)}, "
            f"takes about {size(memory_estimate(plan, threads, devices))} of memory{self._spooled(plan, threads)}\n"
        )
        if to_fetch := fetches(plan):
            again = f", of that {size(to_fetch.again)} once more or oftener, for statistics" if to_fetch.again else ""
            self.out.print(f"fetches {size(to_fetch.bytes)} by range{again}; nothing of it is stored\n")
        if prediction is not None:
            self.out.print(headline(prediction))
            self.out.print(table(("", ">in all", ">a node", ">rate", ">time"), rows(prediction)))
            self.out.print()
        elif (why := not_predicted(plan)) is not None:
            self.out.print(f"{why}\n")
        if self.verbose:
            jobs = [
                (job.name, shape_text(job.shape), job.dtype, json_output.what_happens(plan, job)) for job in plan.jobs
            ]
            self.out.print(table(("tensor", "shape", "dtype", "what happens"), jobs))
        else:
            self.out.print(table((">tensors", ">size", "dtype", "what happens"), map(_row, groups(plan))))
        left_out = [f"left out: {name} of {reference}: {why}" for reference, name, why in plan.left_out]
        left_out += [f"not copied: {name}: {why}" for name, why in companions(plan)[1].items()]
        self.lines(left_out)
        for note in plan.notes:
            self.warn(note)

    def _spooled(self, plan: Plan, threads: int | None) -> str:
        """Return what outputs in object stores take of this machine's disk, as the end of a sentence."""
        nbytes = spool_bytes(plan, threads or writing_workers())
        return f", at most {size(nbytes)} of {spool_folder()} until it is uploaded" if nbytes else ""

    def headline(self, plan: Plan) -> None:
        """Print in a line what the run is about to do."""
        if not self.quiet:
            self.err.print(
                f"{counted(len(plan.merged), 'tensor')} to merge, {len(plan.copied):,} to copy, "
                f"{len(plan.left_out):,} left out; "
                f"{size(plan.bytes_to_read)} to read, {size(plan.bytes_to_write)} to write"
            )
        for note in plan.notes:
            self.warn(note)

    @contextmanager
    def progress(
        self, what: str = "merging", crew: Cluster | None = None, unit: str = ""
    ) -> Iterator[Callable[[int, int], None] | None]:
        """Show a bar with rate and time left on a terminal, elsewhere a line now and then.

        Of each machine of a ``crew`` its rate is shown, too. What is counted are bytes, or a ``unit``.
        """
        if self.quiet:
            yield None
        elif self.err.is_terminal:
            counts = (MofNCompleteColumn(), TextColumn(unit)) if unit else (DownloadColumn(), TransferSpeedColumn())
            columns = (TextColumn(what), BarColumn(), *counts, TimeRemainingColumn())
            with _ProgressOfNodes(*columns, console=self.err, transient=True) as bar:
                bar.crew = crew
                task = bar.add_task(what, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        else:
            yield _plain_progress(crew, unit)

    def finished(self, plan: Plan, finished: Finished, *, resumed: bool) -> None:
        """Print the outputs, and what became of alpha; no rate where an earlier run did a part of it."""
        for output, report in zip(finished.outputs, finished.reports, strict=True):
            if not self.quiet:
                self.out.print(made(output, plan.layout.nbytes))
                self._effect(report)
                if report.fp8_error is not None:
                    self.out.print(f"  FP8 weights differ from the exact results by {report.fp8_error:.2%} (RMS)")
                self._explained(report)
                self._coefficients(report)
            self.warn(_advice(report))
            self.warn(no_line(report))
        if not self.quiet:
            if not is_single_file(plan.outputs[0]):
                not_copied = companions(plan)[1]
                self.lines([f"not copied: {name}: {why}" for name, why in not_copied.items()])
            rate = (plan.bytes_to_read + plan.bytes_to_write) / max(finished.seconds, 1e-9)
            self.err.print(f"{finished.seconds:.1f} s" + f", {size(rate)}/s read and written" * (not resumed))
        self.missing(plan)

    def nodes(self, crew: Cluster | None) -> None:
        """Print what each machine of a Ray cluster did, and warn of those that could do nothing."""
        for node in crew.nodes.values() if crew is not None else ():
            if node.refused:
                self.warn(f"{node.name} was left out: it {plain_line(node.refused)}.")
            elif node.lost:
                self.warn(f"{counted(node.lost, 'worker')} of {node.name} ended early; others did their work.")
            if node.tasks and not self.quiet:
                self.err.print(f"  {node.name}: {size(node.nbytes)} read, {size(node.rate)}/s")

    def missing(self, plan: Plan) -> None:
        """Print what the outputs lack to be loaded, if anything: the last line of a plan or a run."""
        self.warn(what_is_missing(plan))

    def _effect(self, report: Report) -> None:
        if not report.tensors:
            return
        if report.asked is None or report.effective is None:
            self.out.print("  the models don't differ in what was merged: the output equals the aligned model")
            return
        how = "exact" if report.exact else "from a fixed sample of the weights"
        self.out.print(
            f"  alpha {report.asked:g}, effective {report.effective:.4f} after rounding ({how}); "
            f"RMS(delta) {report.rms_delta:.1e}"
        )
        if report.identical:
            self.out.print(f"  {report.identical:,} of {counted(report.merged, 'tensor')} identical in both models")
        if self.verbose or _is_far(report):
            worst = report.worst if self.verbose else report.worst[:SHOWN]
            rows = [(f"  {t.name}", f"{t.asked:g}", f"{t.effective:.4f}", f"{t.rms_delta:.1e}") for t in worst]
            self.out.print(table(("  tensor", ">asked", ">effective", ">RMS(delta)"), rows))

    def _explained(self, report: Report) -> None:
        if report.explained is None:
            return
        if report.explained.share is None:
            self.out.print("  the checkpoints don't differ from the base in what was merged: the output equals it")
            return
        told, least = report.explained, report.explained.least
        below = sum(share < told.bound for _, share in least)
        self.out.print(
            f"  one line explains {told.share:.2%} of the checkpoints' variance, a licence from {told.bound:.2%} on; "
            f"below that: {counted(below, 'tensor')} of {len(told.tensors):,}"
        )
        shown = least if self.verbose else least[:SHOWN]
        self.out.print(table(("  least explained", ">share"), [(f"  {name}", f"{share:.2%}") for name, share in shown]))

    def _coefficients(self, report: Report) -> None:
        if not report.coefficients:
            return
        models = list(dict.fromkeys(model for of_tensor in report.coefficients.values() for model in of_tensor))
        by_model = {m: [row[m] for row in report.coefficients.values() if m in row] for m in models}
        self.out.print(f"  coefficients over {counted(len(report.coefficients), 'tensor')}")
        rows = [(f"  {m}", *(f"{x:.4f}" for x in (min(of), fmean(of), max(of)))) for m, of in by_model.items()]
        self.out.print(table(("  model", ">least", ">mean", ">most"), rows))
        if self.verbose:
            of_tensors = [
                (f"  {name}", *(f"{row[m]:.4f}" if m in row else "" for m in models))
                for name, row in report.coefficients.items()
            ]
            self.out.print(table(("  tensor", *(f">{model}" for model in models)), of_tensors))

    def lines(self, lines: Sequence[str]) -> None:
        """Print lines, the first few of them unless everything is to be shown."""
        shown = lines if self.verbose else lines[:SHOWN]
        for line in shown:
            self.out.print(plain_line(line))
        if len(lines) > len(shown):
            self.out.print(f"… and {len(lines) - len(shown):,} more (-v shows all)")


class PlainConsole(Console):
    """A console on which text is text: no brackets are markup, and strangers' control characters are replaced."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render something to segments, of which only rich's own may hold control codes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


def console(stream: TextIO) -> Console:
    """Return a console that wraps words on a terminal, and breaks no line in a file or pipe."""
    terminal = stream.isatty()
    width = None if terminal else PIPE_WIDTH
    return PlainConsole(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=not terminal, width=width)


def made(path: object, nbytes: int | None = None) -> Text:
    """Return the line that names something that was written, and its size if it is given."""
    return Text.assemble(("made", "bold green"), f" {path}", "" if nbytes is None else f"  {size(nbytes)}")


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as text: ``4096 × 512``."""
    return " × ".join(map(str, shape)) or "scalar"


def table(headings: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Return a plain table; columns whose heading starts with ``>`` are flush right. Long lines break."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        right = heading.startswith(">")
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(heading.lstrip(">"), justify=justify, no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _row(group: Group) -> tuple[str, str, str, Text]:
    what = Text(group.what)
    what.append(f"\nfor example {group.example}", "dim")
    return f"{group.tensors:,}", size(group.nbytes), group.dtype, what


class _ProgressOfNodes(Progress):
    """A bar, and under it the machines of a Ray cluster, each with its workers and rate."""

    crew: Cluster | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar and the lines under it."""
        yield from super().get_renderables()
        if lines := _rates(self.crew):
            yield Text("\n".join(lines), "dim")


def _rates(crew: Cluster | None) -> list[str]:
    """Return a line for each machine that works, as far as they fit on a screen."""
    nodes = [node for node in crew.nodes.values() if node.workers] if crew is not None else []
    lines = [f"{node.name}  {counted(node.workers, 'worker')}  {size(node.rate)}/s" for node in nodes[:SHOWN_NODES]]
    return lines + [f"… and {len(nodes) - SHOWN_NODES:,} more"] * (len(nodes) > SHOWN_NODES)


def _plain_progress(crew: Cluster | None = None, unit: str = "") -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL:
            last = now
            rate = done / (now - started)
            left = (total - done) / rate
            counts = f"{done:,} of {total:,} {unit}" if unit else f"{size(done)} of {size(total)}  {size(rate)}/s"
            line = f"{done / total:4.0%}  {counts}  {left:.0f} s left"
            print("; ".join([line, *_rates(crew)]), file=sys.stderr)

    return show


def _is_far(report: Report) -> bool:
    if report.effective is None or not report.asked:
        return False
    return abs(report.effective - report.asked) > FAR * abs(report.asked)


def no_line(report: Report) -> str | None:
    """Return a warning where a run's checkpoints lie along no line; None where they do, or none was followed."""
    if report.explained is None or report.explained.is_enough:
        return None
    return (
        f"one line explains {report.explained.share:.2%} of the checkpoints' variance. Below "
        f"{report.explained.bound:.2%}, at these steps, a run has wandered further than it went in any direction: what "
        "lies ahead on the line is mostly noise. Take checkpoints that are further apart, or average them "
        "(merge_method: schedule_average)."
    )


def _advice(report: Report) -> str | None:
    if not _is_far(report):
        return None
    return (
        f"alpha {report.asked:g} became {report.effective:.4f}: many changes are smaller than the spacing of the "
        "output's dtype, and rounding to nearest takes them away or doubles them. --rounding stochastic keeps them on "
        "average, --out-dtype float32 keeps them all."
    )
