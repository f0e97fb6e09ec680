"""A sandbox, in which code that a model wrote can do little harm.

``bubblewrap`` (the program ``bwrap``) starts Python in namespaces of its own, and so the code gets

- no network, not even the machine's own, and no way to see or signal another process;
- the files of this interpreter, read-only: its program, its standard library without installed packages, the shared
  libraries that those load and the loader's list of them, the time zones. No /proc, no /etc else, no home. ``/tmp`` is
  an empty folder in memory of a limited size;
- no privilege; where root runs it, a user id that nobody has;
- an empty environment, nothing on standard input; what it prints is thrown away;
- one process with at most 64 threads, which ends with its time; limits on processor time, memory and open files.

A system call filter (``refused_calls.py``) keeps it to one process, and to the memory that its limit counts.

**The verdict** is the process's exit status, which bubblewrap reports to this side from outside of the sandbox. A
passed run ends with a number that is drawn for each run, so leaving early is no way to pass, by accident or not. Tests
run in the interpreter in which the answer's code ran before, and so code that sets out to cheat can pass its own
tests: an object that says it equals everything is enough. It can't touch another answer's verdict, nor end the stage.

Not held off: a flaw in the kernel, and load on processors and memory up to the limits. What the kernel notes of file
names and locks comes on top of the memory limit and is bounded by the time alone: some 100 MB a second at most.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mergekit_lite.answers.scoring.refused_calls import call_filter
from mergekit_lite.answers.scoring.scorer import Positive, ScorerOptions
from mergekit_lite.errors import MergekitLiteError, one_line

INSIDE = Path(__file__).with_name("sandboxed.py")
WALLS = ("--die-with-parent", "--new-session", "--clearenv")
AS_USER = ("--unshare-all", "--uid", "65534", "--gid", "65534")
# Root needs no user namespace. It becomes another user inside, since the kernel counts no processes of root.
AS_ROOT = ("--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts",
           "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")  # fmt: skip
ALSO_VISIBLE = ("/etc/ld.so.cache", "/usr/share/zoneinfo")  # where libraries lie; what the module ``zoneinfo`` reads
PACKAGES = ("site-packages", "dist-packages")
LONGEST_REASON = 1 << 12  # bytes
PATIENCE = 3  # seconds by the clock for one of processor time: other programs use the processor too
FIRST_USER = 2_000_000_000  # beyond the ids of real users
users = itertools.count()


class SandboxLimits(ScorerOptions):
    """The resources that an answer's code may use."""

    seconds: Positive = 10  # of processor time
    memory_mb: Positive = 1024  # address space
    files_mb: Positive = 16  # all its files together; they are in memory too


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
    if sys.platform != "linux" or not hasattr(os, "geteuid"):
        raise _not_here(f"this system is {sys.platform}")
    passed_status = 2 + secrets.randbelow(100)  # neither what Python ends with by itself nor a signal's
    user = FIRST_USER + (os.getpid() * 64 + next(users)) % 100_000_000 if _is_root() else None
    task = {"code": code, "tests": list(tests), "passed_status": passed_status, "user": user}
    task |= {"seconds": limits.seconds, "memory": limits.memory_mb << 20}
    patience = PATIENCE * limits.seconds + 1
    ended = _run(task, limits, patience)
    if ended is None:
        return SandboxResult(False, f"not done after {patience} s")
    status, said = ended
    if status == passed_status:
        return SandboxResult(True)
    left = f"ended before its tests did, with status {status}: beyond a limit, or of its own will"
    return SandboxResult(False, said or left)


def check_sandbox(limits: SandboxLimits) -> None:
    """Run an empty program, to see that the sandbox works.

    Raises:
        SandboxError: it can't be built.
    """
    outcome = run_sandboxed("", [], limits)
    if not outcome.passed:
        raise _not_here(outcome.why)


@cache
def interpreter_files() -> tuple[str, ...]:
    """Return what code can read: the interpreter, its standard library, and the shared libraries of both."""
    program, library = os.path.realpath(sys.executable), sysconfig.get_path("stdlib")
    extensions = map(str, Path(library, "lib-dynload").glob("*.so"))
    # Asked in this way, the loader lists what a program and its preloaded libraries need, and starts nothing.
    loader = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": " ".join(extensions)}
    listed = subprocess.run(
        [program],
        env=loader,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    ).stdout
    needed = sorted(set(re.findall(r"(/.*) \(0x", listed)))
    return (program, library, *(path for path in needed if not Path(path).is_relative_to(library)))


def _run(task: dict[str, Any], limits: SandboxLimits, patience: float) -> tuple[int, str] | None:
    """Return the exit status and what the program says of its failure, a line; None where its time is over."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise _not_here("there is no program `bwrap`")
    try:
        refused = call_filter(os.uname().machine)
    except KeyError as error:
        raise _not_here(f"its filter of system calls doesn't know the processor {error}") from error
    with (
        _pipe() as alive,
        _file(refused) as filtered,
        _file(b"") as report,
        _file(json.dumps({**task, "alive": alive}).encode()) as given,
    ):
        channels = ["--seccomp", str(filtered.fileno()), "--json-status-fd", str(report.fileno())]
        program = [interpreter_files()[0], "-I", "-S", f"/{INSIDE.name}"]
        process = subprocess.Popen(
            [bwrap, *_walls(limits), *channels, "--", *program],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,  # read once the program has ended: one that fills it waits until it is killed
            env={},
            pass_fds=(alive, filtered.fileno(), report.fileno()),
            start_new_session=True,
        )
        assert process.stderr is not None
        with process.stderr:
            try:
                in_time = _ends(process, patience)
            finally:
                process.kill()  # and with it all that is inside
                process.wait()
            if not in_time:
                return None
            os.set_blocking(process.stderr.fileno(), False)
            said = one_line((process.stderr.read(LONGEST_REASON) or b"").decode(errors="replace"))
        report.seek(0)
        status = _exit_code(report.read())
    if status is None:  # bubblewrap gave up before the program began
        raise _not_here(said or f"bwrap ended with status {process.returncode}")
    return status, said


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Return whether a process ends within the seconds, as soon as it does: ``Popen.wait`` looks every 50 ms only."""
    handle = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(1000 * seconds))
    finally:
        os.close(handle)


def _walls(limits: SandboxLimits) -> list[str]:
    """Return the options of ``bwrap``."""
    options = [*WALLS, *(AS_ROOT if _is_root() else AS_USER)]
    options += ["--chdir", "/tmp", "--size", str(limits.files_mb << 20), "--perms", "1777", "--tmpfs", "/tmp"]
    visible = [("--ro-bind", path) for path in interpreter_files()]
    visible += [("--ro-bind-try", path) for path in ALSO_VISIBLE]
    visible += [("--dev-bind", device) for device in ("/dev/null", "/dev/urandom")]
    for folder in sorted({str(folder) for _, path in visible for folder in Path(path).parents}):
        options += ["--dir", folder]  # those that ``bwrap`` makes by itself are closed to all but their owner
    for how, path in visible:
        options += [how, path, path]
    for packages in (Path(interpreter_files()[1], name) for name in PACKAGES):
        if packages.is_dir():
            options += ["--size", "4096", "--tmpfs", str(packages), "--remount-ro", str(packages)]
    return [*options, "--ro-bind", str(INSIDE), f"/{INSIDE.name}", "--remount-ro", "/"]


def _is_root() -> bool:
    """Return whether this is the machine's root, and not a container's, which has few user ids to become."""
    users_here = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    return os.geteuid() == 0 and users_here == ["0", "0", "4294967295"]


def _exit_code(report: bytes) -> int | None:
    """Return the program's exit status from bubblewrap's report, a line of JSON for each event; None if it has none."""
    events = [json.loads(line) for line in report.splitlines()]
    return next((event["exit-code"] for event in events if "exit-code" in event), None)


@contextmanager
def _pipe() -> Iterator[int]:
    """Open a pipe and yield its end to read from, at which others see whether this process is alive."""
    ends = os.pipe()
    try:
        yield ends[0]
    finally:
        for end in ends:
            os.close(end)


@contextmanager
def _file(content: bytes) -> Iterator[BinaryIO]:
    """Open a file without a name that has the content, to be read from its start."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        yield file


def _not_here(what: str) -> SandboxError:
    return SandboxError(
        f"Can't run code that models wrote, for there is no sandbox: {what}. It takes Linux on x86-64 or aarch64, "
        "bubblewrap (`apt install bubblewrap`, `dnf install bubblewrap`), and namespaces that this user may make: "
        "ask for the sysctls user.max_user_namespaces and kernel.unprivileged_userns_clone above 0, and "
        "kernel.apparmor_restrict_unprivileged_userns=0; a container has to allow them too."
    )
