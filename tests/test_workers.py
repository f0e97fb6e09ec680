"""Forked workers: none outlives its parent, and whatever ends one early is told with what to do."""

from __future__ import annotations

import errno
import faulthandler
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mergekit_lite.engine import processes
from mergekit_lite.engine.processes import forked
from mergekit_lite.errors import PlanError, RunError
from tests.models import state, tuned, write_folder
from tests.processes import Forked
from tests.waiting import is_gone

WORKERS = 3
EXTRAPOLATE = ("extrapolate", "sft", "dpo", "--alpha", "0.3")
TIES = ("merge", "ties.yml")


def squared() -> Callable[[int], int]:
    return lambda number: number**2


def test_every_task_is_done_once() -> None:
    for workers, tasks in ((1, 5), (WORKERS, 100), (WORKERS, 2), (WORKERS, 0)):
        assert sorted(forked(workers, range(tasks), squared)) == [number**2 for number in range(tasks)]


def test_what_a_task_raises_is_raised_here() -> None:
    class Unpicklable(Exception):
        pass

    def failing(error: Exception) -> Callable[[int], int]:
        def fail(number: int) -> int:
            raise error

        return fail

    with pytest.raises(MemoryError) as caught:
        list(forked(WORKERS, range(9), lambda: failing(MemoryError())))
    assert "in fail\n    raise error" in str(caught.value.__cause__), "where it was raised"
    with pytest.raises(RunError, match="2 problems"):
        list(forked(WORKERS, range(9), lambda: failing(PlanError(["one", "two"]))))  # its arguments are not its message
    with pytest.raises(RuntimeError, match=r"(?s)in a worker:.*raise error.*Unpicklable: of no use elsewhere"):
        list(forked(WORKERS, range(9), lambda: failing(Unpicklable("of no use elsewhere"))))


SAID = {
    signal.SIGKILL: "ended by SIGKILL .* fewer --threads need less. .*--resume",
    signal.SIGSEGV: "ended by SIGSEGV .* A library crashed .*--resume",
    signal.SIGTERM: "ended by SIGTERM .* Somebody stopped it. .*--resume",
}


@pytest.mark.parametrize("number", SAID)
def test_how_a_worker_ended_is_said(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Before its first task is sent, in its start-up, at a task."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def end(*_: object) -> None:
        faulthandler.disable()
        os.kill(os.getpid(), number)

    def ending() -> Callable[[int], None]:
        end()
        return end

    said = rf"Worker \d \(process \d+\) was {SAID[number]}"
    with pytest.raises(RunError, match=said):
        list(forked(WORKERS, range(9), ending))
    with pytest.raises(RunError, match=said):
        list(forked(WORKERS, range(9), lambda: end))
    started = processes._started

    def ended(*arguments: object) -> object:
        process = started(*arguments)  # type: ignore[arg-type]
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return process

    monkeypatch.setattr(processes, "_serve", end)
    monkeypatch.setattr(processes, "_started", ended)
    with pytest.raises(RunError, match=said):
        list(forked(WORKERS, range(9), squared))


def test_where_no_status_is_kept() -> None:
    """A parent may inherit that SIGCHLD is ignored: then nobody learns how a child ended."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert sorted(forked(WORKERS, range(5), squared)) == [0, 1, 4, 9, 16]
        with pytest.raises(RunError, match="ended before its work was done"):
            list(forked(WORKERS, range(9), lambda: lambda number: os._exit(7)))
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("call", ["send", "recv", "send_bytes"])
def test_a_broken_connection_is_a_message(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(processes.Connection, call, broken)
    # Workers answer by ``send_bytes``, and their parent doesn't use it.
    said = "it could not send a result" if call == "send_bytes" else "can't be reached: Input/output error"
    with pytest.raises(RunError, match=rf"Worker \d \(process \d+\) .*{said}.*--resume"):
        list(forked(WORKERS, range(9), squared))


@pytest.mark.parametrize(("limit", "remedy"), [(errno.EMFILE, "ulimit -n"), (errno.EAGAIN, "ulimit -u")])
def test_a_worker_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, limit: int, remedy: str) -> None:
    fork, started = os.fork, list[int]()

    def forks_twice() -> int:
        if len(started) == 2:
            raise OSError(limit, os.strerror(limit))
        if process := fork():
            started.append(process)
        return process

    monkeypatch.setattr(os, "fork", forks_twice)
    with pytest.raises(RunError, match=rf"Worker 3 can't be started: .*--threads.*{remedy}"):
        list(forked(WORKERS, range(9), squared))
    for process in started:
        with pytest.raises(ChildProcessError):  # it is gone
            os.waitpid(process, os.WNOHANG)


def orphaned(widened: str, prctl_works: bool) -> None:
    """Start workers that note their ids, in a process that is to be killed; ``widened`` is where each is slow."""
    found = processes.c_function

    def noted() -> None:
        Path(f"worker-{os.getpid()}").touch()

    def slow_function(name: str) -> object:
        if widened == "start":
            noted()
            time.sleep(0.3)
        return found(name) if prctl_works else None

    def worker() -> Callable[[int], None]:
        noted()
        return lambda number: time.sleep(0.2 if widened != "idle" else 0)

    processes.c_function = slow_function  # type: ignore[assignment]
    for _ in forked(WORKERS, range(1000), worker):
        if widened == "idle":
            time.sleep(60)


@pytest.mark.parametrize("prctl_works", [True, False])
@pytest.mark.parametrize("widened", ["start", "task", "idle"])
def test_no_worker_outlives_its_parent(tmp_path: Path, widened: str, prctl_works: bool) -> None:
    with Forked(tmp_path, orphaned, widened, prctl_works) as parent:
        until = time.monotonic() + 60
        while len(workers := [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]) < WORKERS:
            assert time.monotonic() < until and parent.running, parent.end()
            time.sleep(0.002)
        parent.send(signal.SIGKILL if prctl_works else signal.SIGTERM)
        parent.end()
    assert all(map(is_gone, workers)), "a worker goes on"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    sft = state(0)
    for name, weights in (("sft", sft), ("dpo", tuned(sft, 1))):
        write_folder(folder / name, weights, config={"model_type": "llama"})
    recipe = "{merge_method: ties, base_model: sft, models: [{model: dpo}], parameters: {weight: 1, density: 0.5}}"
    (folder / "ties.yml").write_text(recipe)
    return folder


# Counts imports, files and processes from the first import of the command on.
INTERRUPTED = """
import os, runpy, sys
left = int(sys.argv.pop(1))
started = False
def heard(event, arguments):
    global left, started
    started = started or (event == "import" and arguments[0] == "mergekit_lite.commands")
    if started and event in ("import", "open", "os.fork", "os.mkdir", "os.rename"):
        left -= 1
        if left == 0:
            os.killpg(0, 2)
sys.addaudithook(heard)
runpy.run_module("mergekit_lite", run_name="__main__", alter_sys=True)
"""
LAST_EVENT = 750


def interrupted(pair: Path, event: int) -> tuple[int, str]:
    """Run the command in a group of its own that Ctrl-C reaches at some event; return its exit code and messages."""
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(event), *EXTRAPOLATE, "-o", "out", "--force"],
        cwd=pair,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        _, messages = process.communicate(timeout=300)
        with pytest.raises(ProcessLookupError):  # nothing of its group is left
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, messages


def test_ctrl_c_at_any_moment_ends_it_without_a_traceback(pair: Path) -> None:
    chance = random.Random(seed := random.randrange(1 << 30))
    print(f"{seed=}")
    for event in [1, *(chance.randrange(n * LAST_EVENT // 6, (n + 1) * LAST_EVENT // 6) for n in range(6))]:
        code, messages = interrupted(pair, event)
        assert "Traceback" not in messages, (event, messages)
        assert code in (-signal.SIGINT, 0, 1) and (code != 1 or "Interrupted" in messages), (event, code, messages)


@pytest.mark.parametrize(
    ("command", "limit", "most", "said"),
    [
        (EXTRAPOLATE, resource.RLIMIT_NOFILE, 10, "Worker 3 can't be started: Too many open files. .*ulimit -n"),
        (TIES, resource.RLIMIT_NOFILE, 7, "Too many files are open: this process may open 7. .*ulimit -n"),
        (TIES, resource.RLIMIT_AS, 60 << 20, r"The memory ran out: .* 63 MB \(ulimit -v\). .*--threads"),
    ],
)
def test_limits_that_are_too_low_are_named(
    pair: Path, command: tuple[str, ...], limit: int, most: int, said: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "mergekit_lite", *command, "-o", "limited", "--force", "--threads", "3"],
        cwd=pair,
        capture_output=True,
        text=True,
        preexec_fn=partial(resource.setrlimit, limit, (most, most)),
        check=False,
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended
    assert re.search(f"^Error: {said}", ended.stderr, re.MULTILINE), ended
