"""What tests of the page have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_lite.commands.app.places import Places
from tests.models import state, tuned, write_folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    root = tmp_path / "root"
    base = state(0)
    write_folder(root / "base", base)
    write_folder(root / "math", tuned(base, 1))
    write_folder(root / "code", tuned(base, 2))
    write_folder(tmp_path / "secret", tuned(base, 3))
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(root)
    return Places(root, tmp_path / "cache")
