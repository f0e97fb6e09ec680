"""The folder on this machine for what stands in for files elsewhere: one for each user, closed to others."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from mergekit_lite.errors import CheckpointError

KEPT_FOR = 7 * 24 * 3600  # seconds


def private_folder() -> Path:
    """Return it; what nobody used for a week is removed. Raises CheckpointError where it isn't this user's alone."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    home = Path(tempfile.gettempdir()) / f"mergekit-lite-{user}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
    except OSError as error:
        raise CheckpointError(f"{home}: can't be made: {error.strerror}. Set TMPDIR to a folder of yours.") from error
    is_ours = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
    if not stat.S_ISDIR(status.st_mode) or not is_ours:
        raise CheckpointError(f"{home}: is not a folder of yours alone. Remove it, or set TMPDIR to a folder of yours.")
    for old in home.iterdir():
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > KEPT_FOR:
                shutil.rmtree(old, ignore_errors=True)
    return home
