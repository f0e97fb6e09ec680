"""Tables, plots and pages that appear under their names when they are complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_lite.errors import RunError, reason


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield where to write a file that then takes its name. Raises RunError where it can't be written."""
    partial = path.with_name(f"writing-{path.name}")  # keeps the ending, which tells matplotlib the format
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise RunError(f"Can't write {path}: {reason(error)}.") from error
