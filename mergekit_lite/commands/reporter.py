"""The reports of a distillation's stages, on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mergekit_lite.commands.screen import PLAIN_INTERVAL, console, table
from mergekit_lite.distillation.reporter import Advance, Reporter
from mergekit_lite.plain_text import plain_line


class TerminalReporter(Reporter):
    """Prints results to standard output, all else to standard error.

    Progress is a bar for each task on a terminal, elsewhere a line now and then. ``quiet`` prints warnings only.
    """

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self.out = console(sys.stdout)
        self.err = console(sys.stderr)
        self._bars: Progress | None = None

    def line(self, text: str) -> None:
        """Print a result or a step."""
        if not self.quiet:
            self._print(Text(text))

    def warn(self, text: str) -> None:
        """Print what the user should look at."""
        self.err.print(Text.assemble(("Warning: ", "yellow bold"), text))

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table."""
        if not self.quiet:
            self._print(table(headings, rows))

    def _print(self, what: RenderableType) -> None:
        # bars that are on the screen would be drawn over what is printed elsewhere
        (self.err if self._bars else self.out).print(what)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show progress with rate and time left; yields what is called with the number of items done."""
        if self.quiet or not total:
            yield lambda more, note="": None
        elif self.err.is_terminal:
            with self._bar(what, total, done) as advance:
                yield advance
        else:
            yield _plain(what, total, done)

    @contextmanager
    def _bar(self, what: str, total: int, done: int) -> Iterator[Advance]:
        outermost = self._bars is None
        if self._bars is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
            )
            self._bars = Progress(*columns, console=self.err, transient=True)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(what, total=total, completed=done, note="")

        def advance(more: int, note: str = "") -> None:
            bars.update(task, advance=more)
            if note:
                bars.update(task, note=note)

        try:
            yield advance
        finally:
            if outermost:
                bars.stop()
                self._bars = None


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else rate(task.speed), "dim")


def rate(speed: float) -> str:
    """Return a rate as text: ``12.3/s``, or ``4.2/min`` where it is slow."""
    return f"{speed:.1f}/s" if speed >= 1 else f"{60 * speed:.1f}/min"


def _plain(what: str, total: int, done: int) -> Advance:
    started = last = time.monotonic()
    before, told = done, ""

    def advance(more: int, note: str = "") -> None:
        nonlocal last, done, told
        done, told = done + more, note or told
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL:
            last = now
            speed = max(done - before, 1e-9) / (now - started)
            left = (total - done) / speed
            line = f"{plain_line(what)}  {done / total:4.0%}  {done:,} of {total:,}  {rate(speed)}  {left:,.0f} s left"
            print(f"{line}  {told}".rstrip(), file=sys.stderr)

    return advance
