"""Systems that lack what Linux has: the same bytes without it, and consoles that can't show every character."""

from __future__ import annotations

import ast
import os
import pty
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest

from mergekit_lite.answers.scoring.sandbox import SandboxError, SandboxLimits, check_sandbox
from mergekit_lite.answers.serving import split_command
from mergekit_lite.checkpoint.references import Addition, split_names, split_reference
from mergekit_lite.commands import limits
from mergekit_lite.distillation.training.watch import peak_memory
from mergekit_lite.errors import GOES_ON, UsageError
from mergekit_lite.file_names import unfit_on_windows
from mergekit_lite.output.card import ABSOLUTE, ON_WINDOWS
from mergekit_lite.output.publishing import check_target
from tests.elsewhere import jobs
from tests.elsewhere.lacking import LACKING, MISSING
from tests.models import tree_bytes

ROOT = Path(__file__).parents[1]
ADVICE = f"--threads. {GOES_ON}"


def elsewhere(place: Path, *arguments: str, stderr: int | None = None, **environment: str) -> subprocess.Popen[bytes]:
    """A Python that knows as little of its system as on Windows."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "elsewhere"), str(ROOT)])}
    environment = {**os.environ, **paths, **environment}
    return subprocess.Popen([sys.executable, *arguments], cwd=place, env=environment, stderr=stderr)


def test_the_main_jobs_give_the_same_bytes(tmp_path: Path) -> None:
    """Killed on the way and resumed, by a Python without the calls of POSIX, and by this one without a stop."""
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        place.mkdir()
        jobs.make_inputs(place)
    journal, until = there / ".resumed.partial" / "journal.jsonl", time.monotonic() + 300
    with elsewhere(there, "-m", "tests.elsewhere.jobs", "FIRST", SEEKS="15") as killed:
        try:
            while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
                assert time.monotonic() < until and killed.poll() is None
                time.sleep(0.01)
        finally:
            killed.kill()
    assert (there / "rows.partial.jsonl").exists() and not (there / "resumed").exists()
    assert elsewhere(there, "-m", "tests.elsewhere.jobs", "REST").wait() == 0
    with chdir(here):
        jobs.first()
        jobs.rest()
    assert tree_bytes(there) == tree_bytes(here)


def test_candidates_are_measured_side_by_side(tmp_path: Path) -> None:
    """By processes that are reached as on Windows; one that dies is replaced, the others end in order."""
    with elsewhere(tmp_path, "-m", "tests.elsewhere.measuring") as process:
        assert process.wait() == 0
    assert (tmp_path / "stopped").read_text() == 2 * "in order\n"


def on_console(place: Path, encoding: str, *arguments: str) -> str:
    """What a command shows on a terminal of an encoding."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    command = [sys.executable, "-m", "mergekit_lite", *arguments]
    process = subprocess.Popen(command, cwd=place, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "cp437"])
def test_a_console_that_lacks_characters(tmp_path: Path, encoding: str) -> None:
    """Bars, arrows and Greek letters are shown as well as it can; nothing fails."""
    jobs.make_inputs(tmp_path)
    shown = on_console(tmp_path, encoding, "extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "αβ→out")
    assert "alphabeta->out" in shown or "αbeta->out" in shown  # cp437 has an alpha of its own
    assert (tmp_path / "αβ→out" / "model.safetensors.index.json").exists()
    formula = on_console(tmp_path, encoding, "methods", "slerp")
    assert "theta" in formula or "Θ" in formula or "θ" in formula


@pytest.mark.parametrize("name", ["CON", "nul.pt", "Lpt1.safetensors", "a:b", "a\\b", "what?", "end.", "end "])
def test_names_that_windows_lacks(name: str) -> None:
    assert unfit_on_windows(name) is not None


@pytest.mark.parametrize("name", ["model", "v1.2.safetensors", "console", "com0x", "αβ→out"])
def test_names_that_windows_has(name: str) -> None:
    assert unfit_on_windows(name) is None


@pytest.mark.parametrize("name", ["CON", "NUL.d/out", "../end./out", "a:b"])
def test_outputs_that_windows_can_not_have(tmp_path: Path, name: str) -> None:
    """No part of the path may have such a name: a folder neither."""
    jobs.make_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["-m", "mergekit_lite", "extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", name]
    process = elsewhere(tmp_path, *command, stderr=subprocess.PIPE)
    said = process.communicate()[1].decode()
    assert process.returncode == 2 and "Windows can't have the name" in said, said
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_on_a_drive_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path != Path(path.anchor) and exists(path))
    with pytest.raises(UsageError, match=r"out: there is no / here\. Choose another path"):
        check_target(tmp_path / "out", [], resume=False, force=False)


def test_references_with_drives() -> None:
    assert split_reference(r"C:\models\a+D:\lora") == (r"C:\models\a", (Addition(r"D:\lora"),))
    vector = Addition(r"E:\v.safetensors", -2, is_vector=True)
    assert split_reference(r"C:\a+vector:E:\v.safetensors:-2") == (r"C:\a", (vector,))
    assert split_names(r"hf=C:\config:D:\step") == (r"D:\step", r"C:\config")
    assert split_names(r"hf:D:\step") == (r"D:\step", "")


@pytest.mark.parametrize("path", [r"C:\Users\me\base", r"C:\\Users\\me\\base", "D:/models/base", r"\\server\all\base"])
def test_no_card_tells_a_path_of_windows(path: str) -> None:
    recipe = ABSOLUTE.sub(r"\1", ON_WINDOWS.sub(r"\1", f'models:\n- model: "{path}"\n- https://host/x: org/name\n'))
    assert recipe == 'models:\n- model: "base"\n- https://host/x: org/name\n'


def test_commands_with_paths_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    command = r"""'C:\with spaces\server.exe' -m {model} --name "a b" #1"""
    assert split_command(r"serve a\ b") == ["serve", "a b"]
    monkeypatch.setattr(os, "sep", "\\")
    assert split_command(command) == [r"C:\with spaces\server.exe", "-m", "{model}", "--name", "a b", "#1"]


def test_without_resource_and_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")  # which looks for it itself
    monkeypatch.setitem(sys.modules, "resource", None)
    assert limits.limit_reached(MemoryError()) == f"The memory ran out. Raise the limit, or take fewer {ADVICE}"
    assert 10_000_000 < peak_memory() < 1 << 40
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SandboxError, match="this system is win32"):
        check_sandbox(SandboxLimits())


HANDLED = {  # where the system is asked first, or nothing runs without POSIX
    "answers/scoring/sandbox.py", "answers/scoring/sandboxed.py", "answers/scoring/math_worker.py",
    "answers/serving.py", "answers/watchdog.py", "boosting/measure/processes.py", "boosting/measure/worker.py",
    "checkpoint/stores/private_folder.py",
    "commands/app/pace.py", "commands/app/runs.py", "commands/limits.py", "distillation/training/watch.py",
    "engine/pool.py", "engine/processes.py", "output/file_writer.py", "output/sync.py", "output/working_folder.py",
    "locks.py", "positioned.py", "prediction/cluster.py", "prediction/made_up.py",
}  # fmt: skip


def test_what_only_posix_has_is_used_in_known_places() -> None:
    package = ROOT / "mergekit_lite"
    using = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id=module), attr=name) if name in LACKING.get(module, "").split():
                    using.add(path.relative_to(package).as_posix())
                case ast.Import(names=[ast.alias(name=name)]) | ast.ImportFrom(module=name) if name in MISSING:
                    using.add(path.relative_to(package).as_posix())
    assert using == HANDLED
