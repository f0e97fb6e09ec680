"""The program inside the sandbox: runs an answer's code and its tests, and ends with a status that tells the result.

It is started by ``sandbox.py`` with ``python -I -S`` and reads its task from standard input:

    {"code": …, "tests": [ … ], "passed_status": 77, "seconds": 10, "memory": bytes, "user": 1234 or null, "alive": 5}

Why a test failed goes to standard error, for people to read: nobody decides by it. Nothing but the standard library is
imported here: the package is not visible in the sandbox.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
import types
from typing import Any

THREADS = OPEN_FILES = 64
SHOWN = 300  # characters of an error


def main() -> None:
    """Read the task, give up privileges, set the limits, run the code."""
    task = json.load(sys.stdin)
    reasons = os.dup(2)
    silence()
    if task["user"] is not None:
        become(task["user"])
    limit(task["seconds"], task["memory"])
    if is_over(task["alive"]):
        return
    why = failure(task["code"], task["tests"])
    if why is None:
        os._exit(task["passed_status"])
    os.write(reasons, why.encode(errors="replace"))
    os._exit(1)


def silence() -> None:
    """Connect standard input, output and error to the null device."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def become(user: int) -> None:
    """Become another user, by which root loses all capabilities."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def limit(seconds: int, memory: int) -> None:
    """Set limits that this process can't raise again."""
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, THREADS),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hardest = resource.getrlimit(what)[1]
        most = most if hardest == resource.RLIM_INFINITY else min(most, hardest)
        resource.setrlimit(what, (most, most))


def is_over(pipe: int) -> bool:
    """Return whether the process that holds the other end of a pipe has ended.

    ``bwrap`` ends with that process, and this one with ``bwrap``; but not where either died before the tie was made.
    """
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 1) == b""
    except BlockingIOError:
        return False
    finally:
        os.close(pipe)


def failure(code: str, tests: list[str]) -> str | None:
    """Run the code once, then each test with its names. Returns why one of them failed, or None."""
    stage = "the code"
    try:
        program = compile(code, "answer.py", "exec", dont_inherit=True)
        module = types.ModuleType("answer")  # not __main__: an answer's main program isn't tested
        sys.modules["answer"] = module
        exec(program, module.__dict__)
        for number, test in enumerate(tests, 1):
            stage = f"test {number}"
            names: dict[str, Any] = dict(module.__dict__)
            exec(compile(test, "test.py", "exec", dont_inherit=True), names)
    except BaseException as error:  # SystemExit too: leaving early doesn't pass
        said = traceback.format_exception_only(type(error), error)[-1].strip()
        return f"{stage}: {said[:SHOWN]}"
    return None


if __name__ == "__main__":
    main()
