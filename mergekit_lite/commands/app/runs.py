"""Runs of commands in processes of their own, one at a time; what they are is kept on the disk.

A run outlives the page's server. It holds a lock from its start to its end, of whatever kind that is, so a server that
is started later knows whether it goes on. What the server knows of a run lies in one folder in the root: the recipe,
what was asked for, and what the command said.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mergekit_lite.errors import UsageError
from mergekit_lite.input_files import read_text
from mergekit_lite.plain_text import plain

FOLDER = ".mergekit-lite-app"
PROGRAM = (sys.executable, "-m", "mergekit_lite.commands.app.child")
MOST_SAID = 100_000  # characters of what a command said, from its end
PROGRESS = re.compile(r"^ *(\d+)%  (.*)$")


def shown_command(arguments: list[str]) -> str:
    """Return a command as one types it."""
    return shlex.join(["mergekit-lite", *arguments])


def ask(
    root: Path, arguments: list[str], seconds: float = 600, environment: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return what a command that only looks prints to both of its streams, without its progress.

    ``environment`` goes before this process's own. Raises UsageError where it takes longer than some seconds.
    """
    try:
        done = subprocess.run(
            [*PROGRAM, *arguments], cwd=root, timeout=seconds,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UsageError(f"It took longer than {seconds:g} s: {shown_command(arguments)}") from None
    return said_in(done.stdout).text


class Said(NamedTuple):
    """What a command said without its progress, and the last of that as a share and in words."""

    text: str
    share: float | None
    progress: str


def said_in(streams: bytes) -> Said:
    """Return what a command said, from the bytes of its streams."""
    lines, share, progress = [], None, ""
    for line in plain(streams[-MOST_SAID:].decode("utf-8", "replace")).splitlines():
        if match := PROGRESS.match(line):
            share, progress = int(match[1]) / 100, match[2]
        else:
            lines.append(line)
    return Said("\n".join(lines), share, progress)


@dataclass(frozen=True)
class State:
    """How the latest run stands.

    Attributes:
        kind: ``none``, ``running``, ``stopped`` (it can be resumed), ``failed`` (it can't) or ``done``.
        output: the name that was given to what it makes.
        outputs: the folders that it makes: that one, or several whose names begin so.
        arguments: of the command that is or was run.
        share: what is done of it, from 0 to 1; None where that isn't known.
        progress: the command's own words on that: bytes, rate, time left.
        said: what it said otherwise.
    """

    kind: str
    output: str = ""
    outputs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    share: float | None = None
    progress: str = ""
    said: str = ""


class Runs:
    """The latest run in a root."""

    def __init__(self, root: Path, online: Mapping[str, str]) -> None:
        """Look at what a server before left in ``root``; runs that read from the hub get some variables for that."""
        self.root = root
        self.online = online
        self.folder = root / FOLDER
        self._starting = threading.Lock()

    def start(self, text: str, output: str, outputs: Sequence[str], *, streamed: bool = False) -> None:
        """Merge as a recipe's text says, to folders of an output's name or of names that begin so.

        ``streamed``: models of the hub are read by range. Raises UsageError where a run goes on already.
        """
        given = output if list(outputs) == [output] else f"{output}-{{name}}"
        arguments = ["merge", f"{FOLDER}/{output}.yml", "-o", given, *["--stream"] * streamed]
        self._launch(arguments, output, outputs, text)

    def keep(self, text: str) -> str:
        """Keep the text of a recipe that is only looked at, and return the file's name; no output's is that."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        (self.folder / ".planned.yml").write_text(text, encoding="utf-8", newline="")
        return f"{FOLDER}/.planned.yml"

    def resume(self) -> None:
        """Go on with the latest run. Raises UsageError where it goes on already, or nothing is left of it."""
        state = self.state()
        if state.kind != "stopped":
            raise UsageError("There is no run that was stopped.")
        arguments = [each for each in state.arguments if each != "--resume"]
        self._launch([*arguments, "--resume"], state.output, state.outputs)

    def stop(self) -> None:
        """Interrupt the run, as Ctrl-C does, if one goes on."""
        process = self._record().get("process")
        if process and self._is_locked():
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGINT)

    def state(self) -> State:
        """Return how the latest run stands."""
        goes_on = self._is_locked()
        record = self._record()
        if not record:
            return State("none")
        output, outputs, arguments = record["output"], tuple(record["outputs"]), tuple(record["arguments"])
        path = self.folder / "said"
        told = said_in(path.read_bytes() if path.exists() else b"")
        state = State("running", output, outputs, arguments, told.share, told.progress, told.text)
        if goes_on:
            return state
        if all((self.root / each).exists() for each in outputs):
            return replace(state, kind="done", share=1.0, progress="")
        return replace(state, kind="stopped" if self._is_begun(state) else "failed", progress="")

    def _is_begun(self, state: State) -> bool:
        """Whether a run that isn't done left something to go on with."""
        given = state.arguments[state.arguments.index("-o") + 1]
        left = (f".{given}.documents", *state.outputs, *(f".{each}.partial" for each in state.outputs))
        return any((self.root / each).exists() for each in left)

    def _launch(self, arguments: list[str], output: str, outputs: Sequence[str], text: str | None = None) -> None:
        """Start a command with the lock in its hands, after the recipe's text was written if there is one."""
        with self._starting:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            lock = self._lock()
            if lock is None:
                raise UsageError("A run goes on: wait for its end, or stop it.")
            try:
                if text is not None:
                    (self.folder / f"{output}.yml").write_text(text, encoding="utf-8", newline="")
                with (self.folder / "said").open("wb") as said:
                    process = subprocess.Popen(
                        [*PROGRAM, *arguments], cwd=self.root, stdin=subprocess.DEVNULL, stdout=said,
                        stderr=subprocess.STDOUT, pass_fds=[lock], start_new_session=True,
                        env=os.environ | (self.online if "--stream" in arguments else {}),
                    )  # fmt: skip
                record = {"arguments": arguments, "output": output, "outputs": [*outputs], "process": process.pid}
                new = self.folder / "run.json.new"
                new.write_text(json.dumps(record), encoding="utf-8")
                new.replace(self.folder / "run.json")
            finally:
                os.close(lock)  # the process has it
            threading.Thread(target=process.wait, daemon=True).start()  # so that it doesn't stay as a zombie

    def _lock(self, kind: int = fcntl.LOCK_EX) -> int | None:
        """Return the open file of the lock, held; None where a run holds it."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def _is_locked(self) -> bool:
        if not self.folder.is_dir():
            return False
        with self._starting:
            lock = self._lock(fcntl.LOCK_SH)
        if lock is not None:
            os.close(lock)
        return lock is None

    def _record(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        record: dict[str, Any] = json.loads(read_text(path, MOST_SAID)) if path.exists() else {}
        return record
