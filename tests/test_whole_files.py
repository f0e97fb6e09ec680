"""Files of reports are there whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_lite.errors import RunError
from mergekit_lite.pages import drawing
from mergekit_lite.pages.whole_files import written_whole


class FullDisk:
    """A figure that a full disk stops."""

    def savefig(self, path: Path, **_options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")


def test_what_failed_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_make_plain", lambda _figure: None)
    plot = tmp_path / "plot.png"
    with written_whole(plot) as partial:
        partial.write_bytes(b"old")
    with pytest.raises(RunError, match=r"Can't write .*plot\.png: No space left on device\."):
        drawing.save(FullDisk(), plot)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"] and plot.read_bytes() == b"old"
