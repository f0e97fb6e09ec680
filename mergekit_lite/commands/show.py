"""What the user sees: the plan, the progress, the result. Plain lines where the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from mergekit_lite.errors import counted

if TYPE_CHECKING:
    from mergekit_lite.engine.report import Report
    from mergekit_lite.engine.run import Finished
    from mergekit_lite.plan import Plan

SHOWN = 5
FAR = 0.1  # relative distance of the effective from the asked alpha that is worth a word
PLAIN_INTERVAL = 10.0  # seconds between lines of progress where there is no terminal


class Screen:
    """Results go to standard output, all else to standard error."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        """``quiet`` leaves warnings and errors only; ``verbose`` shows every tensor."""
        self.quiet = quiet
        self.verbose = verbose
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    def warn(self, message: str | None) -> None:
        """A warning, if there is one."""
        if message:
            self.err.print("[yellow bold]Warning:[/] ", end="")
            self.err.print(message, markup=False)

    def plan(self, plan: Plan, threads: int | None) -> None:
        """The whole plan."""
        if self.quiet:
            return
        data = plan_as_data(plan, threads)
        for source in data["inputs"]:
            self.out.print(
                f"[bold]input[/]   {source['reference']}  {counted(source['tensors'], 'tensor')}, {_size(source['bytes'])}"
            )
        for output in data["outputs"]:
            self.out.print(
                f"[bold]output[/]  {output}  {counted(len(plan.layout.files), 'file')}, {_size(plan.layout.nbytes)}"
            )
        self.out.print(
            f"reads {_size(data['bytes_to_read'])}, writes {_size(data['bytes_to_write'])}, "
            f"needs about {_size(data['memory'])} of memory"
        )
        self.out.print(_groups(plan))
        for reference, name, why in plan.left_out[: None if self.verbose else SHOWN]:
            self.out.print(f"left out  {name} of {reference}: {why}", markup=False)
        hidden = len(plan.left_out) - SHOWN
        if hidden > 0 and not self.verbose:
            self.out.print(f"left out  … and {hidden:,} more (-v shows all)")
        for entry in data["beside"]["not_copied"]:
            self.out.print(f"not copied  {entry['name']}: {entry['why']}", markup=False)
        for note in plan.notes:
            self.warn(note)
        if self.verbose:
            self.out.print(_every_tensor(plan))

    def headline(self, plan: Plan) -> None:
        """What is about to happen, in a line or two."""
        if self.quiet:
            return
        self.err.print(
            f"{counted(len(plan.merged), 'tensor')} to merge, {len(plan.copied):,} to copy, {len(plan.left_out):,} left out; "
            f"{_size(plan.bytes_to_read)} to read, {_size(plan.bytes_to_write)} to write"
        )
        for note in plan.notes:
            self.warn(note)

    @contextmanager
    def progress(self) -> Iterator[Callable[[int, int], None] | None]:
        """A bar with rate and time left on a terminal; elsewhere a line now and then."""
        if self.quiet:
            yield None
        elif self.err.is_terminal:
            columns = (
                TextColumn("merging"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.err, transient=True) as bar:
                task = bar.add_task("merging", total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        else:
            yield _plain_progress()

    def finished(self, plan: Plan, finished: Finished) -> None:
        """What was made, and what became of alpha."""
        from mergekit_lite.output.beside import files_beside

        if self.quiet:
            for report in finished.reports:
                self.warn(_advice(report, plan))
            return
        for output, report in zip(finished.outputs, finished.reports, strict=True):
            self.out.print(f"[bold green]made[/] {output}  {_size(plan.layout.nbytes)}", markup=True)
            self._effect(report, plan)
        code = [name for name, why in files_beside(plan.inputs[0])[1].items() if why == "code"]
        if code and plan.inputs[0].folder and any(output.is_dir() for output in finished.outputs):
            self.err.print(f"Code is not copied: {', '.join(code)}. Copy it yourself if you trust it.", markup=False)
        rate = (plan.bytes_to_read + plan.bytes_to_write) / max(finished.seconds, 1e-9)
        self.err.print(f"{finished.seconds:.1f} s, {_size(rate)}/s read and written")

    def _effect(self, report: Report, plan: Plan) -> None:
        if report.effective is None or report.asked is None:
            self.out.print("  the models don't differ in what was merged: the output equals the aligned model")
            return
        how = "exact" if report.exact else "from a fixed sample of the weights"
        self.out.print(
            f"  alpha {report.asked:g}, effective {report.effective:.4f} after rounding ({how}); RMS(delta) {report.rms_delta:.2e}"
        )
        if report.identical:
            self.out.print(f"  {counted(report.identical, 'tensor')} of {report.merged:,} identical in both models")
        shown = report.worst if self.verbose else report.worst[:SHOWN]
        if _is_far(report) or self.verbose:
            table = Table(box=None, pad_edge=False, header_style="dim")
            for heading, justify in (
                ("  tensor", "left"),
                ("asked", "right"),
                ("effective", "right"),
                ("RMS(delta)", "right"),
            ):
                table.add_column(heading, justify=justify)  # type: ignore[arg-type]
            for tensor in shown:
                table.add_row(
                    f"  {tensor.name}", f"{tensor.asked:g}", f"{tensor.effective:.4f}", f"{tensor.rms_delta:.2e}"
                )
            self.out.print(table)
        self.warn(_advice(report, plan))


def plan_as_data(plan: Plan, threads: int | None) -> dict[str, Any]:
    """The plan for machines."""
    from mergekit_lite.engine.memory import memory_estimate
    from mergekit_lite.output.beside import files_beside

    copied, not_copied = files_beside(plan.inputs[0])
    return {
        "inputs": [
            {
                "reference": c.reference,
                "tensors": len(c.tensors),
                "bytes": sum(spec.nbytes for spec in c.tensors.values()),
            }
            for c in plan.inputs
        ],
        "outputs": [str(output) for output in plan.outputs],
        "files": [{"name": file.name, "bytes": file.size} for file in plan.layout.files],
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
        "memory": memory_estimate(plan, threads),
        "tensors": [
            {
                "name": job.name,
                "shape": list(job.shape),
                "dtype": job.dtype,
                "method": plan.recipe.merge_method if job.merged else "copy",
                "why": job.why,
                "parameters": [dict(parameters) for parameters in job.parameters],
                "copied_elements": job.numel - job.merged,
            }
            for job in plan.jobs
        ],
        "left_out": [{"model": model, "name": name, "why": why} for model, name, why in plan.left_out],
        "beside": {"copied": copied, "not_copied": [{"name": name, "why": why} for name, why in not_copied.items()]},
        "notes": list(plan.notes),
    }


def finished_as_data(finished: Finished) -> dict[str, Any]:
    """The result for machines."""
    return {
        "seconds": round(finished.seconds, 3),
        "outputs": [
            {"path": str(output), **report.to_json()}
            for output, report in zip(finished.outputs, finished.reports, strict=True)
        ],
    }


def _groups(plan: Plan) -> Table:
    """The jobs grouped by what happens to them."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading, justify in (
        ("what happens", "left"),
        ("tensors", "right"),
        ("bytes", "right"),
        ("dtype", "left"),
        ("for example", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    groups: dict[tuple[str, str], list[Any]] = {}
    for job in plan.jobs:
        if job.merged:
            numbers = " | ".join(
                ", ".join(f"{k} {v:g}" for k, v in parameters.items()) for parameters in job.parameters
            )
            what = f"{plan.recipe.merge_method}  {numbers}" + (" + new rows copied" if job.merged < job.numel else "")
        else:
            what = "copy" + (f" ({job.why})" if job.why else "")
        sources = {spec.stored_dtype for spec in job.inputs}
        groups.setdefault((what, f"{', '.join(sorted(sources))} → {job.dtype}"), []).append(job)
    for (what, kinds), jobs in groups.items():
        size = sum(plan_tensor_bytes(job) for job in jobs)
        table.add_row(what, f"{len(jobs):,}", _size(size), kinds, jobs[0].name)
    return table


def plan_tensor_bytes(job: Any) -> int:
    """Bytes of one output tensor."""
    from mergekit_lite import dtypes

    return int(job.numel * dtypes.size(job.dtype))


def _every_tensor(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("tensor", "shape", "dtype", "what happens"):
        table.add_column(heading)
    for job in plan.jobs:
        numbers = " | ".join(", ".join(f"{k} {v:g}" for k, v in parameters.items()) for parameters in job.parameters)
        table.add_row(
            job.name,
            "×".join(map(str, job.shape)),
            job.dtype,
            f"{plan.recipe.merge_method} {numbers}" if job.merged else f"copy {job.why}",
        )
    return table


def _plain_progress() -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL:
            last = now
            rate = done / (now - started)
            left = (total - done) / rate if rate else 0.0
            print(
                f"{done / total:4.0%}  {_size(done)} of {_size(total)}  {_size(rate)}/s  {left:.0f} s left",
                file=sys.stderr,
            )

    return tell


def _is_far(report: Report) -> bool:
    if report.effective is None or not report.asked:
        return False
    return abs(report.effective - report.asked) > FAR * abs(report.asked)


def _advice(report: Report, plan: Plan) -> str | None:
    """What to do where rounding took much of alpha away."""
    if not _is_far(report):
        return None
    return (
        f"alpha {report.asked:g} became {report.effective:.4f}: the change is smaller than the spacing of {plan.jobs[0].dtype}, and "
        "rounding to nearest takes it away. --rounding stochastic keeps it on average, --out-dtype float32 keeps it all."
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
