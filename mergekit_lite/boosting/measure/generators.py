"""Generators of candidates' answers: the model in this process, or a server of the user's over a temporary folder."""

from __future__ import annotations

import json
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
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

from mergekit_lite.answers.asking import Respondent, Sampling, Task
from mergekit_lite.answers.local import Local, ready
from mergekit_lite.answers.rows import Answer, Key
from mergekit_lite.answers.server import Served, Server
from mergekit_lite.boosting.candidates.candidate import Params, label
from mergekit_lite.boosting.measure.resident_model import ResidentModel
from mergekit_lite.errors import RunError, UsageError

if TYPE_CHECKING:
    from mergekit_lite.answers.local import ReadyModel

PLACES = ("{model}", "{port}")
STOP_SECONDS = 20.0  # that a server gets to stop by itself
POLL_SECONDS = 0.2
LONGEST_REPLY = 1 << 20  # bytes that are read of a server's list of its models
SHOWN = 15  # lines of a server's output that an error shows


class LocalGenerator(Local):
    """Answers with the model in this process, in the dtype it will be written in."""

    def __init__(self, resident: ResidentModel, sampling: Sampling, batch_size: int, portion: int) -> None:
        """``batch_size`` answers are generated at once; batches are cut from each ``portion`` of the tasks."""
        super().__init__("candidate", "the candidate", sampling, batch_size=batch_size)
        self.resident = resident
        self.portion = portion

    def for_candidate(self, params: Params) -> Respondent:
        """Load the candidate and return the model."""
        self.resident.load(params)
        return self

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
        """Yield the wanted answers, portion by portion.

        The items wanted first come first in ``tasks``, in whole portions, so no batch is generated for a part of it.
        """
        for start in range(0, len(tasks), self.portion):
            portion = tasks[start : start + self.portion]
            yield from super().answers(portion, wanted.intersection(task.key for task in portion))

    @cached_property
    def tokenizer(self) -> Any:
        """The output's tokenizer."""
        return self.resident.tokenizer

    @cached_property
    def loaded(self) -> ReadyModel:
        """The model in this process, ready to answer."""
        loaded = ready(self.resident.model, self.tokenizer, self.sampling)
        # Candidates far out overflow; their answers show it, and the search needn't end.
        loaded.model.generation_config.remove_invalid_values = True
        return loaded


@dataclass
class ServerGenerator:
    """Answers with a server, which is started for each candidate and stopped when another one is to answer."""

    resident: ResidentModel  # of the family; its model is not built for this
    command: str  # starts the server, with ``{model}`` and ``{port}`` for folder and port. No shell reads it.
    folder: Path  # where candidates are written; each is removed with its server
    sampling: Sampling  # how answers are drawn
    concurrency: int = 32  # open requests
    patience: float = 600.0  # seconds that the server has to load a model
    _running: ExitStack = field(default_factory=ExitStack, init=False)
    _candidate: str = field(default="", init=False)
    _respondent: Respondent | None = field(default=None, init=False)

    def __enter__(self) -> ServerGenerator:
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the running server, and remove its candidate."""
        self._running.close()
        self._candidate = ""

    def for_candidate(self, params: Params) -> Respondent:
        """Start a server over the candidate, unless it is running.

        Raises:
            RunError: the server ended, or wasn't ready in time; the message has the end of its output.
            NonFiniteError: the candidate's weights aren't finite.
        """
        if self._respondent is None or label(params) != self._candidate:
            self.__exit__()
            self._respondent = Served("candidate", self._running.enter_context(self._served(params)))
            self._candidate = label(params)
        return self._respondent

    @contextmanager
    def _served(self, params: Params) -> Iterator[Server]:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a killed search
        try:
            model = self._written(params)
            with _started(serve_words(self.command), model, self.folder / "server.log") as (process, url):
                served_as = _wait(process, url, self.patience, self.folder / "server.log")
                yield Server(url, served_as, self.sampling, concurrency=self.concurrency)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _written(self, params: Params) -> Path:
        from mergekit_lite.boosting.measure.weights import Rewritten
        from mergekit_lite.engine.run import run

        started, path, resident = time.monotonic(), self.folder / "model", self.resident
        finished = run(resident.family.plan(params, path), device=resident.device, threads=resident.threads)
        resident.rewritten[label(params)] = Rewritten(finished.reports[0], ())
        resident.seconds[label(params)] += time.monotonic() - started
        return path


def serve_words(command: str) -> list[str]:
    """Split a command into words. Raises UsageError where it can't start a server over a model."""
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
    """Start the server in a process group that ends with this context or process; yield its process and URL."""
    port = _free_port()
    filled = [word.replace("{model}", str(model)).replace("{port}", str(port)) for word in words]
    watched = [sys.executable, "-I", "-S", str(Path(__file__).with_name("watchdog.py")), *filled]
    with log.open("wb") as output:
        process = subprocess.Popen(watched, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started: SIGTERM first, then SIGKILL."""
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
    """Wait until the server lists its models, and return the name of the first one."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RunError(f"The server ended with exit code {process.returncode} before it was ready.{_said(log)}")
        unready = suppress(URLError, OSError, HTTPException, ValueError, LookupError, TypeError, RecursionError)
        with unready, urlopen(f"{url}/models", timeout=5) as reply:
            return str(json.loads(reply.read(LONGEST_REPLY))["data"][0]["id"])
        time.sleep(POLL_SECONDS)
    raise RunError(f"The server was not ready after {patience:g} s: nothing sound at {url}/models.{_said(log)}")


def _said(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:]
    return "\n".join([" It said:", *(f"  {line}" for line in lines)]) if lines else " It said nothing."


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
