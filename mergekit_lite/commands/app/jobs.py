"""Commands that ask the hub, or give to it, by the user's word: one at a time, followed by the page's server."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mergekit_lite.commands.app.runs import MOST_SAID, PROGRAM, Said, said_in
from mergekit_lite.errors import UsageError

NOTHING = Said("", None, "")


@dataclass(frozen=True)
class JobState:
    """How a command stands: ``none``, ``running``, ``done`` or ``failed``; which it is, and what it said."""

    kind: str
    arguments: tuple[str, ...] = ()
    said: Said = NOTHING


class Job:
    """The latest command of its kind. It knows nothing of those of an earlier server."""

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        """Run commands in a folder, with some variables before this process's own."""
        self.root = root
        self.environment = environment
        self._starting = threading.Lock()
        self._arguments: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._streams: IO[bytes] | None = None

    def start(self, arguments: list[str]) -> None:
        """Start a command. Raises UsageError where the one before goes on."""
        with self._starting:
            if self.state().kind == "running":
                raise UsageError("The one before goes on: wait for its end, or stop it.")
            streams = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the command is the latest one
            self._process = subprocess.Popen(
                [*PROGRAM, *arguments], cwd=self.root, env=os.environ | self.environment, stdin=subprocess.DEVNULL,
                stdout=streams, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._streams, self._arguments = streams, arguments

    def stop(self) -> None:
        """Interrupt the command, as Ctrl-C does, if it goes on."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGINT)

    def state(self) -> JobState:
        """Return how the command stands."""
        if self._process is None or self._streams is None:
            return JobState("none")
        status = self._process.poll()
        descriptor = self._streams.fileno()
        size = os.fstat(descriptor).st_size
        said = said_in(os.pread(descriptor, MOST_SAID, max(0, size - MOST_SAID)))
        kind = "running" if status is None else "failed" if status else "done"
        return JobState(kind, tuple(self._arguments), said)

    def wait(self) -> int:
        """Wait for the command's end, and return its status; 0 where there is none."""
        return self._process.wait() if self._process is not None else 0
