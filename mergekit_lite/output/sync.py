"""Bringing files and folders to the disk, so that a power cut takes back neither bytes nor names."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from mergekit_lite.positioned import open_file

WINDOWS = os.name == "nt"


def sync_tree(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk. Raises OSError."""
    if path.is_dir():
        for folder, _, files in os.walk(path, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
    else:
        _sync(path)


def sync_name(path: Path) -> None:
    """Wait until the name of a file or folder is on the disk, and those of the folders it lies in. Raises OSError."""
    for folder in path.absolute().parents:
        with suppress(PermissionError):  # of a folder that may only be passed through: it isn't this user's
            _sync(folder)


def _sync(path: Path) -> None:
    if WINDOWS and path.is_dir():
        return  # its file system brings names to the disk by itself, and opens no folder
    descriptor = open_file(path, os.O_RDWR if WINDOWS else os.O_RDONLY, links=False)
    try:
        os.fsync(descriptor)
        if sys.platform == "darwin":  # past the disk's own memory, too
            import fcntl

            with suppress(OSError):  # of a file system that has no such call
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)
