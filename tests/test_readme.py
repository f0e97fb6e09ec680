"""The README's commands, run as they stand there, on tiny models under the names it uses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mergekit_lite.commands import main
from tests.models import state, tuned, write_folder
from tests.processes import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WITH_MODELS = ("boost", "distill", "moe", "tokenizer")  # need models with configs and tokenizers: tests of their own
ALL_COMMANDS = re.findall(r"^    (mergekit-lite .*?)(?:  +#.*)?$", README, re.MULTILINE)
STORE = "s3://"  # needs a server: tests/remote
COMMANDS = [command for command in ALL_COMMANDS if command.split()[1] not in WITH_MODELS and STORE not in command]
YAML = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    sft = state(0)
    dpo = tuned(sft, 1)
    write_folder(folder / "tulu-2-7b", sft)
    write_folder(folder / "tulu-2-dpo-7b", dpo)
    torch.save(sft, folder / "sft.pt")
    torch.save(dpo, folder / "dpo.pt")
    (folder / "recipe.yml").write_text(YAML[0])
    return folder


def shell(command: str, place: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        command, shell=True, cwd=place, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def test_commands_in_their_order(place: Path) -> None:
    """As somebody would who begins with nothing but the first two models."""
    shell(COMMANDS[0], place)
    for command in COMMANDS[1:]:
        ended = run(place, *shlex.split(command)[1:])
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"


@pytest.mark.parametrize("command", sorted(set(ALL_COMMANDS) - set(COMMANDS)))
def test_the_others_have_these_options(command: str) -> None:
    verbs = [word for word in command.split()[1:3] if word in (*WITH_MODELS, "merge", "run", "transplant")]
    help_text = CliRunner().invoke(main, [*verbs, "--help"]).output
    assert all(option in help_text for option in re.findall(r"(?<= )--?[a-z][a-z-]*", command))
    assert all((ROOT / recipe).exists() for recipe in re.findall(r"recipes/\S+", command))


def test_the_commands_are_found() -> None:
    assert COMMANDS and set(COMMANDS) < set(ALL_COMMANDS) and len(PYTHON) == len(YAML) == 1


def test_from_a_checkout(place: Path) -> None:
    (command,) = re.findall(r"`python (cli\.py extrapolate .*?)`", README)
    shell(f"{sys.executable} {ROOT}/{command}", place)
    assert (place / "dpo-expo-0.3.pt").exists()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 140


def test_python(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    exec(PYTHON[0], {})


def test_it_leads_to_every_page() -> None:
    """But for two that belong to docs/distill.md."""
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - {"docs/sources.md", "docs/training.md"}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", README))


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
