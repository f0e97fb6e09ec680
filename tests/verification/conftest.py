"""The models whose outputs are verified."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_lite.engine import tiling
from tests.verification.outputs import write_models


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder with the models; spans are short, so that tensors have several."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiling, "SPAN", 1 << 8)
    write_models(tmp_path)
    return tmp_path
