"""Runs of commands in processes of their own, one at a time; what they are is kept on the disk.

A run outlives the page's server. It holds a lock from its start to its end, of whatever kind that is, so a server that
is started later knows whether it goes on. What the server knows of a run lies in one folder in the root: the recipe,
what was asked for, and what the command said; of each kind of run the latest.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from mergekit_lite.commands.app.programs import program
from mergekit_lite.commands.app.resident import Resident
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.input_files import read_text
from mergekit_lite.plain_text import plain

FOLDER = ".mergekit-lite-app"
STREAM = "--stream"  # models are read by range, and nothing of them is stored
RECORDED = {"arguments", "output", "outputs", "process"}  # of a run
MOST_SAID = 100_000  # characters of what a command said, from its end
NOTHING: Mapping[str, str] = MappingProxyType({})
PROGRAM = program("child")
PROGRESS = re.compile(r"^ *(\d+)%  (.*)$")


def shown_command(arguments: list[str]) -> str:
    """Return a command as one types it."""
    return shlex.join(["mergekit-lite", *arguments])


def ask(root: Path, arguments: list[str], seconds: float = 600, environment: Mapping[str, str] = NOTHING) -> str:
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


@dataclass(frozen=True)
class Kind:
    """A kind of runs.

    Attributes:
        name: of the files with what the server knows of it.
        stands: tells from the root and what is known of a run that doesn't go on how it stands: ``done``, ``stopped``
            (it can be resumed) or ``failed`` (it can't).
        resuming: what is added to the command where it goes on.
        apart: whether what it prints as its result is kept apart from what it says, in ``NAME.out``.
        online: whether it asks the hub in any case, not only where models are read by range.
        lock: the file that it holds: of the kinds with the same one, one run goes on at a time.
    """

    name: str
    stands: Callable[[Path, State], str]
    resuming: tuple[str, ...] = ()
    apart: bool = False
    online: bool = False
    lock: str = "lock"


def _given(output: str, outputs: Sequence[str]) -> str:
    """Return what ``-o`` is for a folder of that name, or for several whose names begin so."""
    return output if list(outputs) == [output] else f"{output}-{{name}}"


def _merge_stands(root: Path, state: State) -> str:
    if all((root / each).exists() for each in state.outputs):
        return "done"
    left = (
        f".{_given(state.output, state.outputs)}.documents",
        *state.outputs,
        *(f".{each}.partial" for each in state.outputs),
    )
    return "stopped" if any((root / each).exists() for each in left) else "failed"


def apart(name: str, lock: str) -> Kind:
    """Return a kind of runs that ask the hub beside the others: one is done once it has printed its result."""

    def stands(root: Path, _state: State) -> str:
        path = root / FOLDER / f"{name}.out"
        return "done" if path.exists() and path.stat().st_size else "failed"

    return Kind(name, stands, apart=True, online=True, lock=lock)


MERGE = Kind("run", _merge_stands, ("--resume",))
_STARTING = threading.Lock()  # held while a run is started or looked for: looking takes the run's lock for a moment


def is_own(folder: Path) -> bool:
    """Whether a folder is the page's own: this user's, closed to others, no link.

    What a stranger put beside models under its name is neither shown nor gone on with: a run has any command.
    """
    with suppress(OSError):
        found = folder.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return False


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Raise UsageError where what a run needs can't be written to its folder: no room, no right, no folder."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{folder} can't be written to: {error.strerror}. Nothing was started.") from None


class Runs:
    """The latest run of a kind in a root; of all kinds that share a lock one goes on at a time."""

    def __init__(
        self, root: Path, kind: Kind = MERGE, *, online: Mapping[str, str] = NOTHING, seconds: float | None = None
    ) -> None:
        """Look at what a server before left in ``root``.

        Runs that ask the hub get the variables of ``online``; each is killed after ``seconds``.
        """
        self.root = root
        self.folder = root / FOLDER
        self.kind = kind
        self.online = online
        self.seconds = seconds
        self._follower = threading.Thread()  # sees the run that this server started to its end

    def start(self, text: str, output: str, outputs: Sequence[str] = (), *, streamed: bool = False) -> None:
        """Merge as a recipe's text says, to a folder of an output's name, or to ``outputs`` whose names begin so.

        ``streamed``: models of the hub are read by range. Raises UsageError where a run goes on already.
        """
        recipe = f"{output}.yml"
        outputs = outputs or [output]
        arguments = ["merge", f"{FOLDER}/{recipe}", "-o", _given(output, outputs), *[STREAM] * streamed]
        self.launch(arguments, output, {recipe: text}, outputs)

    def keep(self, text: str) -> str:
        """Keep the text of a recipe that is only looked at, and return the file's name, which no output has.

        Raises UsageError as ``start``.
        """
        with telling(self.folder):
            self._make_folder()
            _put(self.folder / ".planned.yml", text)
        return f"{FOLDER}/.planned.yml"

    def resume(self) -> None:
        """Go on with the latest run. Raises UsageError where it goes on already, or nothing is left of it."""
        state = self.state()
        if state.kind != "stopped":
            raise UsageError("There is no run that was stopped.")
        arguments = [each for each in state.arguments if each not in self.kind.resuming]
        self.launch([*arguments, *self.kind.resuming], state.output, outputs=state.outputs)

    def stop(self) -> None:
        """Interrupt the run, as Ctrl-C does, if one goes on."""
        process = self._record().get("process")
        if process and self._goes_on():
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGINT)

    def wait(self) -> None:
        """Wait for the end of the run that this server started."""
        self._follower.join()

    def printed(self) -> str:
        """Return what the latest run, of a kind that keeps it apart, printed as its result so far."""
        path = self._file("out")
        return said_in(path.read_bytes()).text if path.exists() else ""

    def state(self) -> State:
        """Return how the latest run stands."""
        goes_on = self._goes_on()
        record = self._record()
        if not record:
            return State("none")
        path = self._file("said")
        told = said_in(path.read_bytes() if path.exists() else b"")
        made = record["output"], tuple(record["outputs"]), tuple(record["arguments"])
        state = State("running", *made, told.share, told.progress, told.text)
        if goes_on:
            return state
        kind = self.kind.stands(self.root, state)
        return replace(state, kind=kind, share=1.0 if kind == "done" else told.share, progress="")

    def launch(
        self,
        arguments: list[str],
        output: str,
        files: Mapping[str, str] = NOTHING,
        outputs: Sequence[str] = (),
        resident: Resident | None = None,
    ) -> None:
        """Start a command with the lock in its hands, after some files were written into the page's folder.

        Args:
            arguments: of the command.
            output: the name of what it makes.
            files: their texts by name.
            outputs: the folders that it makes, if not only ``output``.
            resident: runs it, in its process, and has the lock until it is done.

        Raises:
            UsageError: a run goes on, of whatever kind with this lock, or its files can't be written.
        """
        with _STARTING, telling(self.folder):
            self._make_folder()
            lock = self._lock()
            if lock is None:
                raise UsageError("A run goes on: wait for its end, or stop it.")
            try:
                for name, text in files.items():
                    _put(self.folder / name, text)
                out_file = self._file("out").open("wb") if self.kind.apart else nullcontext()
                with self._file("said").open("wb") as said, out_file as out:
                    if resident is not None:
                        process = resident.give(arguments, lock, out or said, said)
                    else:
                        process = self._begun(arguments, lock, out or said, said)
                made = {"output": output, "outputs": [*(outputs or [output])]}
                record = {"arguments": arguments, "process": process, **made}
                _put(self._file("json"), json.dumps(record))
                os.ftruncate(lock, 0)
                os.pwrite(lock, self.kind.name.encode(), 0)
            finally:
                os.close(lock)  # the process has it

    def _begun(self, arguments: list[str], lock: int, out: BinaryIO, said: BinaryIO) -> int:
        """Begin a command in a process of its own, and return its number."""
        process = subprocess.Popen(
            [*PROGRAM, *arguments], cwd=self.root, stdin=subprocess.DEVNULL, stderr=said, stdout=out,
            pass_fds=[lock], start_new_session=True,
            env=os.environ | (self.online if self.kind.online or STREAM in arguments else NOTHING),
        )  # fmt: skip
        self._follower = threading.Thread(target=self._follow, args=(process,), daemon=True)
        self._follower.start()
        return process.pid

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """See a run to its end, so that it doesn't stay as a zombie, or end it when its time is over."""
        try:
            process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if not is_own(self.folder):
            raise UsageError(f"{self.folder} was not made by this page, or is open to others: remove it.")

    def _file(self, ending: str) -> Path:
        return self.folder / f"{self.kind.name}.{ending}"

    def _lock(self, kind: int = fcntl.LOCK_EX) -> int | None:
        """Return the open file of the lock, held; None where a run holds it."""
        path = self.folder / self.kind.lock
        if kind == fcntl.LOCK_SH and not path.exists():
            path = self.folder  # no run was started yet; on a disk that can't be written to it stays so
        lock = os.open(path, os.O_RDONLY if kind == fcntl.LOCK_SH else os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def _goes_on(self) -> bool:
        """Whether a run goes on, and is of this kind."""
        if not is_own(self.folder):
            return False
        with _STARTING:
            lock = self._lock(fcntl.LOCK_SH)
            if lock is None:
                return read_text(self.folder / self.kind.lock, MOST_SAID) == self.kind.name
        os.close(lock)
        return False

    def _record(self) -> dict[str, Any]:
        path = self._file("json")
        if not (is_own(self.folder) and path.exists()):
            return {}
        try:
            record = json.loads(read_text(path, MOST_SAID))
        except (MergekitLiteError, ValueError):  # damaged, as by a power cut
            return {}
        return record if isinstance(record, dict) and record.keys() >= RECORDED else {}


def _put(path: Path, text: str) -> None:
    """Write a file that others may read meanwhile: the old one or all of the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8", newline="")
    new.replace(path)
