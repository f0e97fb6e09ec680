"""The page on previews: its commands, checked on models under the names it uses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lite.commands import main
from tests.preview.pairs import write_model

PAGE = (Path(__file__).parents[2] / "docs" / "preview.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    mergekit-lite (.*)$", PAGE, re.MULTILINE)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("sft", "dpo", "small-sft", "small-dpo", "large")):
        write_model(tmp_path / name, seed=seed)
    (tmp_path / "dev.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        result = CliRunner().invoke(main, [*shlex.split(command), "--dry-run"])
        assert result.exit_code == 0, f"{command}\n{result.output}"
