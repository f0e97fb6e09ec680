"""A sandbox, in which code that a model wrote can do little harm.

On Linux the code gets namespaces of its own (``unshare`` of util-linux), and so

- no network, not even the machine's own;
- no sight of other processes, nor a way to signal them; when it is done or its time is over, all it started is killed;
- a file system of its own: the system's programs and libraries and Python's folders, read-only, and an empty folder in
  memory of a limited size. No home, no /proc, no /etc;
- no privilege; where root runs it, a user id that nobody has;
- an empty environment, nothing on standard input, what it prints is thrown away;
- limits on processor time, time by the clock, memory, file size, open files, and processes.

Not fenced: the kernel itself (a flaw in it is a way out), the load on processors and memory up to the limits, and the
verdict: code that is written to cheat its tests can claim to have passed them. The memory limit is for each process.

``without_walls`` leaves the namespaces out, for systems that don't have them: then the limits hold, but the code reads
and writes what the user may, uses the network, and can signal the user's processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lite.answers.scoring.scorer import Positive, ScorerOptions
from mergekit_lite.errors import MergekitLiteError

INSIDE = Path(__file__).with_name("sandboxed.py")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
WALLS = ("--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--")
LONGEST_REPORT = 1 << 16  # bytes: the capacity of a pipe
PATIENCE = 3  # seconds by the clock for one of processor time: other programs use the processor too
FIRST_USER = 2_000_000_000  # beyond the ids of real users
users = itertools.count()


class SandboxLimits(ScorerOptions):
    """The resources that an answer's code may use."""

    seconds: Positive = 10  # of processor time
    memory_mb: Positive = 1024  # address space of a process
    files_mb: Positive = 16  # all its files together, and each
    processes: Positive = 16
    without_walls: bool = False  # no namespaces, only the other limits


class SandboxResult(NamedTuple):
    """The result of a run: whether all tests passed, and if not, why."""

    passed: bool
    why: str = ""


class SandboxError(MergekitLiteError):
    """The sandbox can't be built on this machine."""


def run_sandboxed(code: str, tests: Sequence[str], limits: SandboxLimits) -> SandboxResult:
    """Run the code, then each test, a program that sees the names of the code and raises where it fails.

    Raises:
        SandboxError: the sandbox can't be built; nothing ran.
    """
    task = {
        "code": code,
        "tests": list(tests),
        "limits": {
            "cpu": limits.seconds,
            "memory": limits.memory_mb << 20,
            "files": limits.files_mb << 20,
            "processes": limits.processes,
        },
        "user": FIRST_USER + (os.getpid() * 64 + next(users)) % 100_000_000 if os.geteuid() == 0 else None,
        "walls": not limits.without_walls,
        "visible": visible_paths(),
    }
    status, report, complaint = _run(task, limits)
    verdict = _verdict(report)
    if verdict is not None and "wall" in verdict:
        raise SandboxError(_no_walls(verdict["wall"]))
    if verdict is not None:
        return SandboxResult(bool(verdict["passed"]), str(verdict["why"]))
    if complaint:  # of ``unshare``: the program inside writes nothing there
        raise SandboxError(_no_walls(complaint))
    if status is None:
        return SandboxResult(False, f"not done after {PATIENCE * limits.seconds + 1} s")
    why = f"ended before its tests did, with status {status}: beyond a limit, or of its own will"
    return SandboxResult(False, why)


def check_sandbox(limits: SandboxLimits) -> None:
    """Run an empty program, to see that the sandbox works.

    Raises:
        SandboxError: it can't be built.
    """
    outcome = run_sandboxed("", [], limits)
    if not outcome.passed:
        raise SandboxError(_no_walls(outcome.why))


def visible_paths() -> list[str]:
    """Return the folders that code can read: the system's programs and libraries and Python's own, no packages."""
    folders = [*SYSTEM, sys.base_prefix, sys.base_exec_prefix]
    visible: list[str] = []
    for folder in folders:
        if Path(folder).exists() and not any(Path(folder).is_relative_to(parent) for parent in visible):
            visible.append(folder)
    return visible


def _run(task: dict[str, Any], limits: SandboxLimits) -> tuple[int | None, bytes, str]:
    """Return the exit status (None: out of time), the program's report, and the complaints of whoever starts it."""
    command = [sys.executable, "-I", "-S", str(INSIDE)]
    if task["walls"]:
        unshare = shutil.which("unshare")
        if unshare is None:
            raise SandboxError(_no_walls("there is no program `unshare` (of util-linux)"))
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        command = [unshare, *user, *WALLS, *command]
    with (
        tempfile.TemporaryDirectory(prefix="fenced-") as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as complaints,
    ):
        given.write(json.dumps(task).encode())
        given.seek(0)
        # The pipe is read once the program has ended; a program that fills it waits until it is killed.
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=complaints,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout:
            try:
                status = process.wait(timeout=PATIENCE * limits.seconds + 1)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill(process)
            os.set_blocking(process.stdout.fileno(), False)
            report = process.stdout.read(LONGEST_REPORT) or b""
        complaints.seek(0)
        return status, report, complaints.read(2000).decode(errors="replace").strip()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group; with namespaces ``--kill-child`` kills what has left it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(report: bytes) -> dict[str, Any] | None:
    try:
        verdict = json.loads(report)
    except (ValueError, RecursionError):
        return None
    return verdict if isinstance(verdict, dict) and ("wall" in verdict or "passed" in verdict) else None


def _no_walls(what: str) -> str:
    return (
        f"Can't fence in code that models wrote: {what}. It takes Linux 5.12 with namespaces that this user may make, "
        f"and util-linux. Run the scorer on such a machine; or, where all that the user can reach may come to harm, "
        f"set the option without_walls: true."
    )
