"""Candidates that answer: the model in this process, or a server of the user's own over a temporary folder."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

from mergekit_lite.answers.asking import Respondent, Sampling, Task
from mergekit_lite.answers.local import Local, ready
from mergekit_lite.answers.rows import Answer, Key
from mergekit_lite.answers.server import Served, Server
from mergekit_lite.boosting.candidates.candidate import Numbers, label
from mergekit_lite.boosting.measure.resident_model import Stand
from mergekit_lite.errors import RunError, UsageError

if TYPE_CHECKING:
    from mergekit_lite.answers.local import Loaded

PLACES = ("{model}", "{port}")
STOP_SECONDS = 20.0  # that a server gets to stop by itself
LOOK_SECONDS = 0.2
TOLD = 15  # lines of a server's output that an error shows


class InProcess:
    """The model on the stand answers."""

    def __init__(self, stand: Stand, sampling: Sampling, batch_size: int, portion: int) -> None:
        """``batch_size`` answers are made at once; batches are cut from each ``portion`` of what is asked."""
        self.stand = stand
        self.local = _OnStand(stand, sampling, batch_size, portion)

    def speaking(self, numbers: Numbers) -> Respondent:
        """The model with the candidate's weights."""
        self.stand.put(numbers)
        return self.local


class _OnStand(Local):
    """A respondent whose model is there already, in the dtype it will be written in."""

    def __init__(self, stand: Stand, sampling: Sampling, batch_size: int, portion: int) -> None:
        super().__init__("candidate", "the candidate", sampling, batch_size=batch_size)
        self.stand = stand
        self.portion = portion

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
        """Portion by portion: what is wanted first comes first in ``tasks``, so no batch is made for a part of it."""
        for start in range(0, len(tasks), self.portion):
            portion = tasks[start : start + self.portion]
            yield from super().answers(portion, wanted.intersection(task.key for task in portion))

    @cached_property
    def tokenizer(self) -> Any:
        return self.stand.tokenizer

    @cached_property
    def loaded(self) -> Loaded:
        loaded = ready(self.stand.model, self.tokenizer, self.sampling)
        # Far out candidates overflow; that shows in what they say, and is no reason for the search to end.
        loaded.model.generation_config.remove_invalid_values = True
        return loaded


@dataclass
class Behind:
    """A server answers, which is started for each candidate and stays until another one speaks.

    Attributes:
        stand: of the family; its model is not built for this.
        command: what starts the server, with ``{model}`` and ``{port}`` for folder and port. No shell reads it.
        folder: of the candidates; each is removed with its server.
        sampling: how answers are drawn.
        concurrency: open requests.
        patience: seconds that the server gets to load a model.
    """

    stand: Stand
    command: str
    folder: Path
    sampling: Sampling
    concurrency: int = 32
    patience: float = 600.0

    def __post_init__(self) -> None:
        """No server is up."""
        self._up = ExitStack()
        self._there = ""
        self._respondent: Respondent | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the server that is up, and remove its candidate."""
        self._up.close()
        self._there = ""

    def speaking(self, numbers: Numbers) -> Respondent:
        """The server over the candidate.

        Raises:
            RunError: the server ended, or didn't get ready in time; with the end of what it said.
            NonFiniteError: the candidate's weights aren't finite.
        """
        if self._respondent is None or label(numbers) != self._there:
            self.__exit__()
            self._respondent = Served("candidate", self._up.enter_context(self._served(numbers)))
            self._there = label(numbers)
        return self._respondent

    @contextmanager
    def _served(self, numbers: Numbers) -> Iterator[Server]:
        """Write the candidate, start the command, wait for the model; then stop it and remove the candidate."""
        shutil.rmtree(self.folder, ignore_errors=True)  # of a killed search
        try:
            model = self._written(numbers)
            with _started(serve_words(self.command), model, self.folder / "server.log") as (process, url):
                served_as = _wait(process, url, self.patience, self.folder / "server.log")
                yield Server(url, served_as, self.sampling, concurrency=self.concurrency)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _written(self, numbers: Numbers) -> Path:
        from mergekit_lite.boosting.measure.weights import Rewritten
        from mergekit_lite.engine.run import run

        started = time.monotonic()
        path = self.folder / "model"
        finished = run(self.stand.family.plan(numbers, path), device=self.stand.device, threads=self.stand.threads)
        self.stand.rewritten[label(numbers)] = Rewritten(finished.reports[0], ())
        self.stand.seconds[label(numbers)] += time.monotonic() - started
        return path


def serve_words(command: str) -> list[str]:
    """A command's words. Raises UsageError where it can't start a server over a model."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--serve-command {command!r}: {error}.") from error
    missing = [place for place in PLACES if place not in command]
    if missing:
        example = "'vllm serve {model} --port {port}'"
        raise UsageError(f"--serve-command lacks {' and '.join(missing)}: expected for instance {example}.")
    if shutil.which(words[0]) is None:
        raise UsageError(f"--serve-command: there is no program {words[0]!r} here.")
    return words


@contextmanager
def _started(words: Sequence[str], model: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The server's process, in a group of its own that ends with this context or this process, and its URL."""
    port = _free_port()
    filled = [word.replace("{model}", str(model)).replace("{port}", str(port)) for word in words]
    kept = [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")), *filled]
    with log.open("wb") as output:
        process = subprocess.Popen(kept, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and all it started, kindly first."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _wait(process: subprocess.Popen[bytes], url: str, patience: float, log: Path) -> str:
    """Until the server tells its models: the name of the first one."""
    import json

    until = time.monotonic() + patience
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RunError(f"The server ended with exit code {process.returncode} before it was ready.{_said(log)}")
        unready = suppress(URLError, OSError, ValueError, LookupError, TypeError)
        with unready, urlopen(f"{url}/models", timeout=5) as reply:
            return str(json.load(reply)["data"][0]["id"])
        time.sleep(LOOK_SECONDS)
    raise RunError(f"The server was not ready after {patience:g} s: nothing sound at {url}/models.{_said(log)}")


def _said(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TOLD:]
    return "\n".join([" It said:", *(f"  {line}" for line in lines)]) if lines else " It said nothing."


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
