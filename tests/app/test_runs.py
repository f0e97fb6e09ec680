"""Runs and the folder that they are kept in, without a browser; what a stranger put there is left alone."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from typing import Any

import pytest

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.runs import FOLDER, PROGRAM, Runs, ask
from mergekit_lite.errors import UsageError
from tests.app.test_parts import TIES
from tests.models import state, write_folder

if not os.environ.get("CI"):
    pytest.importorskip("gradio")
import gradio as gr

from mergekit_lite.commands.app.tabs.parts import IDLE, TICK, Watch


def test_one_run_at_a_time(places: Places) -> None:
    """A run holds the lock, whoever started it."""
    folder = places.root / FOLDER
    folder.mkdir(mode=0o700)
    record = {"arguments": ["merge", "recipe.yml", "-o", "merged"], "output": "merged", "outputs": ["merged"]}
    (folder / "run.json").write_text(json.dumps(record | {"process": 1}))
    (folder / "lock").write_text("run")
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert Runs(places.root).state().kind == "running"
        with pytest.raises(UsageError, match="A run goes on"):
            Runs(places.root).start(TIES, "other")
    assert Runs(places.root).state().kind == "failed"
    assert not (folder / "other.yml").exists()


def test_one_look_at_all_parts_is_quick_where_one_of_them_runs() -> None:
    """Each part gets what it shows; the timer changes only where it has to."""
    running = {"first": False, "second": False}
    asked: list[tuple[Any, ...]] = []

    def part(name: str) -> Any:
        return lambda *known: (running[name], [asked.append(known) or name, len(known)])  # type: ignore[func-returns-value]

    watch = Watch()
    watch.add(part("first"), [gr.State()], [])
    watch.add(part("second"), [gr.State(), gr.State()], [])
    assert watch.looked(IDLE, 1, 2, 3) == [gr.skip(), "first", 1, "second", 2]
    assert asked == [(1,), (2, 3)]
    assert watch.looked(TICK, 1, 2, 3)[0].value == IDLE
    running["second"] = True
    assert watch.looked(IDLE, 1, 2, 3)[0].value == TICK
    assert watch.looked(TICK, 1, 2, 3)[0] == gr.skip()


def test_no_module_comes_from_the_folder_of_the_models(places: Places) -> None:
    """A stranger's model may have files that are named as modules, and commands are run in the folder of models."""
    for name in ("json", "numpy", "torch", "safetensors", "mergekit_lite", "yaml"):
        (places.root / f"{name}.py").write_text("raise SystemExit('code of a model was run')")
    assert "9 tensors" in ask(places.root, ["inspect", "./base"])


@pytest.mark.parametrize("odd", ["open", "link", "damaged", "odd", "part"])
def test_a_run_that_a_stranger_wrote_down_is_none(places: Places, odd: str) -> None:
    """A folder of models from elsewhere may bring a folder of the page's name, with any command to resume."""
    record = {"arguments": ["distill", "run", "rule.yaml"], "output": "base", "outputs": ["base"], "process": 1}
    others = {"damaged": '{"arguments": [', "odd": "[]", "part": json.dumps({"output": "base"})}
    written = others.get(odd, json.dumps(record))
    folder = places.root / FOLDER
    made = places.root.parent / "elsewhere" if odd == "link" else folder
    made.mkdir(mode=0o755 if odd == "open" else 0o700)
    (made / "run.json").write_text(written)
    if odd == "link":
        folder.symlink_to(made)
    runs = Runs(places.root)
    assert runs.state().kind == "none"
    with pytest.raises(UsageError, match="no run that was stopped"):
        runs.resume()
    if odd in ("open", "link"):
        with pytest.raises(UsageError, match="not made by this page"):
            runs.start(TIES, "merged")


def test_where_nothing_can_be_written_it_is_said(places: Places) -> None:
    (places.root / FOLDER).mkdir(mode=0o700)
    (places.root / FOLDER / "merged.yml.new").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="No space left on device"):
        Runs(places.root).start(TIES, "merged")
    assert Runs(places.root).state().kind == "none"


def test_names_that_can_not_be_shown_stop_no_page(places: Places) -> None:
    """Names that are no UTF-8, of two lines, or that turn the direction of text; the nearest models come first."""
    for name in (b"bad\xff", b"two\nlines", "\u202ertl".encode()):
        write_folder(places.root / os.fsdecode(name), state(0))
    write_folder(places.root / "a" / "b", state(0))
    assert places.models() == ["./base", "./code", "./math", "./a/b"]
    json.dumps(places.models()).encode("utf-8")


def test_a_stop_while_it_is_imported_shows_no_traceback(places: Places) -> None:
    python, *code = PROGRAM
    command = [python, "-X", "importtime", *code, "inspect", "./base"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "mergekit_lite._version" in line)  # the first module of many is there
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
