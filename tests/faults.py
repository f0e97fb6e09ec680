"""A process in which a chosen call to the system is hit: it fails, is cut short, or the process stops before it.

``faults.c`` counts and hits the calls, between the program and the C library: so no call that changes the disk escapes,
whichever library makes it. It is loaded when a process starts; hence the functions of a test that need it are called in
a process of its own, which has imported everything once.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

FAULTS = {"stop": -1, "short write": -2, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


class FaultyProcess:
    """A process that calls functions in which calls to the system can be hit."""

    def __init__(self, folder: Path) -> None:
        """Compile what hits the calls into a folder, and start."""
        library = folder / "faults.so"
        source = Path(__file__).with_name("faults.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults"],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "LD_PRELOAD": str(library), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> FaultyProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def call(self, function: Callable[..., object], *arguments: str | int) -> Any:
        """Return what a function returns there: plain data. Raises AssertionError with the traceback of its error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([function.__module__, function.__name__, arguments]) + "\n")
        self._process.stdin.flush()
        value, failure = json.loads(self._process.stdout.readline())
        if failure:
            raise AssertionError(failure)
        return value


class Calls:
    """The calls of this process, and of its forks, that change the disk."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._count = ctypes.c_long.from_buffer(mmap.mmap(-1, mmap.PAGESIZE))  # shared with forks

    @contextmanager
    def hit(self, at: int, fault: str) -> Iterator[None]:
        """Have a fault hit the ``at``-th call from now on."""
        self._count.value = 0
        self._library.arm(ctypes.byref(self._count), ctypes.c_long(at), FAULTS[fault])
        try:
            yield
        finally:
            self._library.arm(None, ctypes.c_long(0), 0)

    @property
    def count(self) -> int:
        """Number of calls since the last fault was armed, of those that it could hit."""
        return self._count.value

    def stops(self, function: Callable[[], object]) -> Iterator[int]:
        """Call a function in a fork, and yield before each call that changes the disk, while the fork stands still."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with self.hit(0, "stop"):
                    function()
                code = 0
            finally:
                os._exit(code)
        while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
            yield self.count
            os.kill(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(status) == 0


def _serve() -> None:
    """Carry out requests, one a line, and answer each with a line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        module, name, arguments = json.loads(line)
        reply = [None, ""]
        try:
            reply[0] = getattr(import_module(module), name)(*arguments)
        except BaseException:
            reply[1] = traceback.format_exc()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
