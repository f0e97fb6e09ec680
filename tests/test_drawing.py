"""Pictures are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_lite.errors import RunError
from mergekit_lite.pages.drawing import new_figure, save

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_that_can_not_be_written_leaves_the_one_before(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"plot.{ending}"
    save(new_figure(1), path)
    before = path.read_bytes()
    (tmp_path / f"writing-plot.{ending}").mkdir()
    with pytest.raises(RunError, match=rf"Can't write .*plot\.{ending}: "):
        save(new_figure(2), path)
    assert path.read_bytes() == before


def test_nothing_is_left_beside_it(tmp_path: Path) -> None:
    save(new_figure(1), tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
