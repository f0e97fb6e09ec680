"""The folder on this machine for what stands in for files elsewhere: one for each user, closed to others.

A process marks each folder in it that it uses, by a file that it holds a lock on; the system takes the lock back when
the process and all that were forked from it have ended, in whatever way. What nobody holds is removed: a stand-in when
it wasn't used for a week, as the next command may want it, and what was fetched at once.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mergekit_lite.errors import CheckpointError
from mergekit_lite.locks import lock_file, wait_for_lock

KEPT_FOR = 7 * 24 * 3600  # seconds
FETCHED = "fetched-"  # begins the names of folders that are of no use to a later process
MARK = "used-by-"
TURN = "turn"
_held: dict[Path, BinaryIO] = {}  # marks of this process, by their folders


@contextmanager
def private_folder() -> Iterator[Path]:
    """Give it, to one process at a time, and without what nobody uses. Raises CheckpointError where it isn't ours."""
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
    with ExitStack() as turn:
        try:
            turn.enter_context(wait_for_lock(home / TURN))
        except OSError as error:
            raise CheckpointError(
                f"{home}: can't be locked: {error.strerror}. Set TMPDIR to another folder."
            ) from error
        for folder in [each for each in home.iterdir() if each.name != TURN]:
            with suppress(OSError):
                if _is_over(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        yield home


def hold(folder: Path) -> None:
    """Keep a folder in the private one, which is given to this process, until it and its forks end. Raises OSError."""
    for mark in folder.glob(f"{MARK}*"):
        if not _is_held(mark):
            mark.unlink(missing_ok=True)
    own = folder / f"{MARK}{os.getpid()}"
    if not (folder in _held and own.exists()) and (file := lock_file(own)) is not None:
        _held[folder] = file
    os.utime(folder)


def let_go(folder: Path) -> None:
    """Hold a folder no longer."""
    if (mark := _held.pop(folder, None)) is not None:
        mark.close()


@atexit.register
def _let_all_go() -> None:
    """Hold nothing longer. The system would see to it; but Python warns of what is open when it ends."""
    for folder in list(_held):
        let_go(folder)


def _is_over(folder: Path) -> bool:
    """Return whether nobody uses a folder, nor will."""
    marks = list(folder.glob(f"{MARK}*"))
    is_old = time.time() - folder.stat().st_mtime > KEPT_FOR
    return (is_old or (folder.name.startswith(FETCHED) and bool(marks))) and not any(map(_is_held, marks))


def _is_held(mark: Path) -> bool:
    if (file := lock_file(mark)) is None:
        return True
    file.close()
    return False
