"""The settings that a stage's results were made with, saved beside them: other settings are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.answers.rows import write_text
from mergekit_lite.errors import UnreadableError, UsageError, listing
from mergekit_lite.input_files import read_json


def hold_settings(path: Path, settings: Mapping[str, Any], results: str, refusal: str | None, advice: str) -> None:
    """Save the settings as JSON, unless results exist that were made with others.

    Args:
        path: the JSON file of the settings.
        settings: as they are now.
        results: the name of the results, for messages.
        refusal: the title of the message that refuses other settings; None where there are no results yet.
        advice: the end of that message: what to do.

    Raises:
        UsageError: the settings differ from the saved ones, or these can't be read.
    """
    if path.exists():
        saved = _read(path, results)
        # What came later than the file, and is off, changes nothing.
        compared = {key: now for key, now in settings.items() if key in saved or now}
        changes = [
            f"{key}: was {saved.get(key)!r}, is {now!r}" for key, now in compared.items() if saved.get(key) != now
        ]
        if not changes:
            return
        if refusal is not None:
            raise UsageError(f"{listing(refusal, changes)}\n{advice}")
    write_text(path, json.dumps(settings, indent=1) + "\n")


def as_from(folder: Path, path: str) -> str:
    """Return an absolute path as it is from a folder, with slashes; on another drive of Windows it stays absolute."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return Path(path).as_posix()


def _read(path: Path, results: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except UnreadableError as error:
        message = f"Can't read {path}: {error.reason}. Delete it, if the {results} are those of this recipe."
        raise UsageError(message) from error
