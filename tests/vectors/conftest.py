"""The models that tests of task vectors have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vectors.family import write_family


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the models of ``tests.vectors.family``."""
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path)
    return tmp_path
