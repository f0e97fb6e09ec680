"""What stands in for files elsewhere stays while a process uses it, for however long, and goes when nobody does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mergekit_lite.checkpoint.stores.private_folder import KEPT_FOR, hold, let_go, private_folder
from mergekit_lite.errors import CheckpointError
from tests.waiting import comes_true

HOLDS = """
import os, sys
from mergekit_lite.checkpoint.stores.private_folder import hold, private_folder
with private_folder() as home:
    for name in sys.argv[1:]:
        (home / name).mkdir(exist_ok=True)
        hold(home / name)
if hasattr(os, "fork") and os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with private_folder() as folder:
        return folder


@contextmanager
def holding(home: Path, *names: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process, and one forked from it, that use some folders."""
    environment = os.environ | {"TMPDIR": str(home.parent), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDS, *names]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()


def names(home: Path) -> set[str]:
    with private_folder() as folder:
        assert folder == home
        return {each.name for each in home.iterdir() if each.is_dir()}


def age(folder: Path) -> None:
    long_ago = folder.stat().st_mtime - KEPT_FOR - 10
    os.utime(folder, (long_ago, long_ago))


def test_what_a_process_uses_stays_for_however_long(home: Path) -> None:
    """Even where only one that was forked from it is left; what nobody uses goes after a week."""
    with holding(home, "stand-in", "fetched-1") as process:
        (home / "unused").mkdir()
        for folder in home.iterdir():
            if folder.is_dir():
                age(folder)
        assert names(home) == {"stand-in", "fetched-1"}
        process.kill()
        process.wait()
        assert names(home) == {"stand-in", "fetched-1"}  # the fork still reads
    assert comes_true(lambda: not names(home))  # the fork has a moment to end


def test_a_process_that_ends_leaves_nothing_open(home: Path) -> None:
    program = [sys.executable, "-W", "error", "-c", HOLDS.replace('hasattr(os, "fork")', "False"), "stand-in"]
    environment = os.environ | {"TMPDIR": str(home.parent), "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(program, env=environment, input="", capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("held\n", "")


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.lock_descriptor", refuse)
    with pytest.raises(CheckpointError, match=r"can't be locked: No locks available\. Set TMPDIR"), private_folder():
        pass


def test_what_a_killed_command_fetched_goes_at_once(home: Path) -> None:
    """It may be many gigabytes, and the next command can't tell what is whole of it."""
    with holding(home, "stand-in", "fetched-1"):
        (home / "fetched-2").mkdir()  # nobody says whose: as of a version without marks
    assert comes_true(lambda: "fetched-1" not in names(home))
    assert names(home) == {"stand-in", "fetched-2"}
    with private_folder():
        hold(home / "stand-in")
    assert len(list((home / "stand-in").iterdir())) == 1, "marks of the dead are gone"
    age(home / "stand-in")
    assert "stand-in" in names(home)
    let_go(home / "stand-in")
    age(home / "stand-in")
    assert "stand-in" not in names(home)
