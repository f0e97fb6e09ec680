"""A demo's command and its processes: two at a time, as a rule with one thread each, what they say kept in files."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from rich.console import Console

console = Console(highlight=False)
# Models this small gain little from a second thread: two processes at a time do more.
AT_ONCE = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Job:
    """A command line, and what it does in a few words."""

    what: str
    command: Sequence[str]
    threads: int = 1


def command(
    folder: str, full: Any, small: Any, repeated: str
) -> Callable[[Callable[[Path, tuple[int, ...], Any], None]], click.Command]:
    """Make a demo's command of a function of the output folder, the seeds and the size (a dataclass with ``seeds``).

    ``repeated`` says what each seed does anew. What is in the folder already is used again.
    """

    def made(function: Callable[[Path, tuple[int, ...], Any], None]) -> click.Command:
        @click.command()
        @click.option("--out", type=click.Path(path_type=Path), default=folder, show_default=True)
        @click.option("--seeds", type=click.IntRange(1), help=f"{repeated}  [default: {full.seeds}]")
        @click.option("--quick", is_flag=True, help="Everything as small as can be: shows that it runs, nothing else.")
        @wraps(function)
        def main(out: Path, seeds: int | None, quick: bool) -> None:
            started, size = perf_counter(), small if quick else full
            claim(out, size)
            function(out, tuple(range(seeds or size.seeds)), size)
            console.print(f"\nEverything is in {out}; {perf_counter() - started:.0f} s in all.")

        return main

    return made


def python(*arguments: object) -> list[str]:
    """Return a command line of this Python."""
    return [sys.executable, "-m", *map(str, arguments)]


def mergekit_lite(*arguments: object) -> list[str]:
    return python("mergekit_lite", *arguments)


def claim(root: Path, size: Any) -> None:
    """Make an output folder; refuse one of another size (a dataclass), as existing results are used again."""
    note, text = root / "size.json", json.dumps(asdict(size)) + "\n"
    if note.exists() and note.read_text() != text:
        raise click.ClickException(f"{root} has a run of another size: delete it, or choose another --out.")
    root.mkdir(parents=True, exist_ok=True)
    note.write_text(text)


def run(jobs: Iterable[Job], logs: Path) -> None:
    """Run all jobs. When one fails the others that run come to their end, and its last lines are shown."""
    logs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(finish, job, logs) for job in jobs]
        try:
            for future in as_completed(futures):
                console.print(future.result(), soft_wrap=True)
        finally:
            pool.shutdown(cancel_futures=True)


def finish(job: Job, logs: Path) -> str:
    """Wait for one job; what it did and how long it took."""
    log = logs / f"{job.what.replace(' ', '-').replace(',', '')}.log"
    started = perf_counter()
    with log.open("w") as file:
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(job.threads)}
        done = subprocess.run(job.command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = "\n".join(log.read_text().splitlines()[-20:])
        raise click.ClickException(f"{job.what}: {' '.join(job.command)} failed. The end of {log}:\n{last}")
    return f"  {job.what} [dim]{perf_counter() - started:.0f} s[/]"


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[str]:
    """Start a server that prints its address first, and stop it at the end. Yields the address."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **ENVIRONMENT}
        )
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            if not address:
                raise click.ClickException(f"The server didn't start:\n{log.read_text()}")
            yield address
        finally:
            server.terminate()
            server.wait()


@contextmanager
def stage(what: str, times: Path | None = None) -> Iterator[None]:
    """Say what is being done, and afterwards how long it and its processes took; appended to ``times``, also when it
    fails.
    """
    console.print(f"[bold]{what}[/]", soft_wrap=True)
    started, before = perf_counter(), _processor_time()
    try:
        yield
    finally:
        took, used = perf_counter() - started, _processor_time() - before
        console.print(f"  [dim]{took:.0f} s, {used:.0f} s of processor time[/]")
        if times:
            with times.open("a") as file:
                file.write(json.dumps({"stage": what, "seconds": took, "processor": used}) + "\n")


def _processor_time() -> float:
    """Return the seconds of processor time that this process and those it has waited for took."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
