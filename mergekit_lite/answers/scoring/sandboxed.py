"""The program inside the sandbox: runs an answer's code and its tests, and reports in a line of JSON whether they pass.

It is started by ``sandbox.py`` with ``python -I -S`` and reads its task from standard input:

    {"code": …, "tests": [ … ], "limits": {"cpu", "memory", "files", "processes"}, "user": 1234 or null,
     "walls": true, "visible": [paths]}

With ``walls`` it is process 1 of namespaces of its own. It builds a file system of a read-only view of the system's
and Python's folders (``visible``) and of a small scratch folder in memory, forks, and gives up every privilege in the
child before the code runs there. When process 1 ends the kernel ends whatever is left. Nothing but the standard library
is imported here: the package is not visible behind the walls.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = "/tmp"  # any folder that exists: mounts on it are visible in this namespace only
SCRATCH = "/scratch"
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
SYS_MOUNT_SETATTR = 442  # on every architecture; Linux 5.12
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
CAPABILITY_VERSION_3 = 0x20080522
SHOWN = 300  # characters of an error

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the task, put up the walls, run the code."""
    os.umask(0o022)
    task = json.load(sys.stdin)
    reports = os.dup(1)
    silence()
    if not task["walls"]:
        confine(task)
        run(task, reports)
        return
    try:
        build_walls(task["visible"], task["limits"]["files"])
    except OSError as error:
        send(reports, {"wall": f"{error.filename}: {error.strerror}"})
        return
    child = os.fork()
    if child == 0:
        os.setsid()
        give_up_privileges(task["user"])
        confine(task)
        run(task, reports)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)  # a signal's exit status, as in shells


def silence() -> None:
    """Connect standard input, output and error to the null device."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def build_walls(visible: list[str], scratch_bytes: int) -> None:
    """Build a root of its own: ``visible`` read-only, an empty scratch folder, two devices; no /proc, no home."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in visible:
        show(path)
    for device in ("/dev/null", "/dev/urandom"):
        show(device)
    Path(ROOT + SCRATCH).mkdir()
    make_read_only(ROOT)
    mount("tmpfs", ROOT + SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch_bytes},nr_inodes=10000,mode=1777")
    os.chroot(ROOT)
    os.chdir(SCRATCH)


def show(path: str) -> None:
    """Mount a file or folder, or copy a symbolic link, under the new root."""
    inside = Path(ROOT + path)
    inside.parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_symlink():
        inside.symlink_to(Path(path).readlink())
        return
    if Path(path).is_dir():
        inside.mkdir(exist_ok=True)
    else:
        inside.touch()
    mount(path, str(inside), None, MS_BIND | MS_REC)


def give_up_privileges(user: int | None) -> None:
    """Drop all capabilities, and the way to new ones; where root runs this, become a user that nobody is."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capabilities")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "privileges")


def confine(task: dict[str, Any]) -> None:
    """Set the limits that hold without namespaces too."""
    limits = task["limits"]
    for name, most in (
        ("RLIMIT_CPU", limits["cpu"]),
        ("RLIMIT_AS", limits["memory"]),
        ("RLIMIT_FSIZE", limits["files"]),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
    ):
        hardest = resource.getrlimit(getattr(resource, name))[1]
        most = most if hardest == resource.RLIM_INFINITY else min(most, hardest)
        resource.setrlimit(getattr(resource, name), (most, most))


def run(task: dict[str, Any], reports: int) -> None:
    """Run the code once, then each test with its names, and report."""
    verdict: dict[str, Any] = {"passed": False, "why": ""}
    stage = "the code"
    try:
        program = compile(task["code"], "answer.py", "exec", dont_inherit=True)
        module = types.ModuleType("answer")  # not __main__: an answer's main program isn't tested
        sys.modules["answer"] = module
        exec(program, module.__dict__)
        for number, test in enumerate(task["tests"], 1):
            stage = f"test {number}"
            exec(compile(test, "test.py", "exec", dont_inherit=True), dict(module.__dict__))
        verdict["passed"] = True
    except BaseException as error:  # SystemExit too: leaving early doesn't pass
        said = traceback.format_exception_only(type(error), error)[-1].strip()
        verdict["why"] = f"{stage}: {said[:SHOWN]}"
    send(reports, verdict)


def send(reports: int, verdict: dict[str, Any]) -> None:
    """Write the line that ``sandbox.py`` waits for."""
    os.write(reports, json.dumps(verdict).encode() + b"\n")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount as the system call does, and raise OSError where that fails."""
    named = [None if text is None else text.encode() for text in (source, target, kind)]
    check(libc.mount(*named, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def make_read_only(folder: str) -> None:
    """Make a folder and everything mounted below it read-only."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    done = libc.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        folder.encode(),
        ctypes.c_uint(AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    check(done, f"mount_setattr {folder}")


def check(result: int, what: str) -> None:
    """Raise OSError with the C library's error number where a call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    main()
