"""Workers as processes of this machine.

Each is a Python of its own (``worker.py``), which imports nothing of the user's main program. Its standard input and
output are the line to it: every system has such pipes, and closes them with the process at either end. So no worker
outlives this process; the system kills it with this process where it can.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mergekit_lite.boosting.candidates.candidate import Job
from mergekit_lite.boosting.measure.workers import MEMORY, STOP_SECONDS, Maker

START = "import sys; sys.path[:] = sys.argv[1:]; from mergekit_lite.boosting.measure.worker import main; main()"


@dataclass
class Processes:
    """Places on this machine, one for each worker."""

    environments: Sequence[Mapping[str, str]]  # of each worker, beside this process's own

    def free(self) -> int:
        """Return how many more workers could be started: all."""
        return len(self.environments)

    def start(self, worker: int, maker: Maker) -> ProcessLine:
        """Start a worker."""
        return ProcessLine(self.environments[worker], maker)


class ProcessLine:
    """One worker, as its parent sees it."""

    def __init__(self, environment: Mapping[str, str], maker: Maker) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        self.name, self.machine_died = f"process {self._process.pid}", False
        self._send(maker)

    def give(self, job: Job) -> None:
        """Send a job."""
        self._send(job)

    def _send(self, what: object) -> None:
        """Send something; pickled twice, so that what can't be unpacked does not break off what comes after it."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: whoever waits for its answer is told how
            pickle.dump(pickle.dumps(what), self._process.stdin)
            self._process.stdin.flush()

    def answers(self) -> Iterator[bytes]:
        """Yield what it sends, until it has ended."""
        assert self._process.stdout is not None
        with self._process.stdout as sent, suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                yield pickle.load(sent)

    def ask_to_stop(self) -> None:
        """Close the line to it."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def end(self) -> str:
        """Close the line, wait until it is gone, and return how it ended."""
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        advice = f". {MEMORY}" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{advice}".rstrip(".")
