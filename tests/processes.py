"""The command in real processes, forked from one that has imported torch: that takes longer than a small run does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import NamedTuple

import torch

from mergekit_lite.commands import start

FORKED = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.processes", "mergekit_lite.extrapolation", "mergekit_lite.merging"]
FORKED.set_forkserver_preload(PRELOADED)


def preload(*modules: str) -> None:
    """Have processes forked from one that has imported these as well; to be said before the first one starts."""
    PRELOADED.extend(modules)
    FORKED.set_forkserver_preload(PRELOADED)


class Ended(NamedTuple):
    """What a process left; where a signal ended it, its code is minus that."""

    returncode: int
    stdout: str
    stderr: str


class Forked:
    """A process that calls a function in a folder; it does not outlive its context."""

    def __init__(self, place: Path, target: Callable[..., object], *arguments: object) -> None:
        """Start it."""
        self._folder = TemporaryDirectory()
        self._told = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for path in self._told:
            path.touch()  # it may be killed before it says anything
        self._process = FORKED.Process(target=_call, args=(place, self._told, target, *arguments))
        self._process.start()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.exitcode is None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended: that may come between."""
        assert self._process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def end(self) -> Ended:
        """Wait for its end."""
        self._process.join(900)  # others may want the cores
        code = self._process.exitcode
        assert code is not None, "still running"
        return Ended(code, *(path.read_text() for path in self._told))


def started(place: Path, *arguments: str | Path, before: Callable[[], None] | None = None) -> Forked:
    """``mergekit-lite`` with some arguments, in a folder. ``before`` is called first, in the new process."""
    return Forked(place, _command, list(map(str, arguments)), before)


def run(place: Path, *arguments: str | Path, before: Callable[[], None] | None = None) -> Ended:
    """The same from its start to its end."""
    with started(place, *arguments, before=before) as process:
        return process.end()


def wait_for_spans(place: Path, output: str, count: int) -> None:
    """Wait until a running process has journalled some spans."""
    journal = place / f".{output}.partial" / "journal.jsonl"
    until = time.monotonic() + 600
    while not (journal.exists() and journal.read_bytes().count(b"\n") > count):
        assert time.monotonic() < until, "the run journals nothing"
        time.sleep(0.002)


def _call(place: Path, told: list[Path], target: Callable[..., object], *arguments: object) -> None:
    """What the new process does."""
    for descriptor, path in enumerate(told, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(place)
    torch.set_num_threads(1)  # more would only wait for each other
    target(*arguments)


def _command(arguments: list[str], before: Callable[[], None] | None) -> None:
    sys.argv = ["mergekit-lite", *arguments]
    if before is not None:
        before()
    start()
