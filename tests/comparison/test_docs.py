"""The page on looking at models: its commands and its Python run, on models under the names it uses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lite.commands import main
from tests.models import state, tuned, write_folder

PAGE = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    mergekit-lite (.*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for names in (("model", "base", "math", "code"), ("", "demo/out/sft", "demo/out/dpo", "demo/out/expo-4")):
        for seed, name in enumerate(filter(None, names)):
            write_folder(tmp_path / name, tuned(state(0), seed) if seed else state(0))
    for step in (25, 50):
        write_folder(tmp_path / f"run/step-{step}", tuned(state(0), step))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, place: Path) -> None:
    result = CliRunner().invoke(main, shlex.split(command))
    assert result.exit_code == 0, result.output
    for made in re.findall(r"--(?:plot|html|csv) (\S+)", command):
        assert (place / made).stat().st_size > 1000


def test_python(place: Path) -> None:
    assert len(COMMANDS) == 6 and len(PYTHON) == 1
    exec(PYTHON[0], {})
