"""Renames that leave alone what has the new name already, or let it change places with what gets the name.

Linux does either in one step (renameat2, since 3.15, on most file systems). Where it can't, a file gets its second name
by a hard link, which is refused where the name is taken; for a folder the name is looked at right before.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

IN_WORKING_FOLDER = -100  # AT_FDCWD: what relative paths are relative to
NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder. Raises OSError; FileExistsError where anything has the new name."""
    try:
        renameat2(source, target, NO_REPLACE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _rename_in_steps(source, target)


def replace_folder(folder: Path, target: Path, aside: Path) -> None:
    """Give a folder the name of what is replaced, and that the name ``aside``. Raises OSError."""
    remove(aside)
    try:
        renameat2(folder, target, EXCHANGE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        target.rename(aside)
        folder.rename(target)
    else:
        folder.rename(aside)


def remove(path: Path) -> None:
    """Remove a folder with all in it, a file or a link, if there is one. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def renameat2(source: Path, target: Path, flags: int) -> None:
    """Rename as the system call does. Raises OSError; one of ``UNSUPPORTED`` where the system has no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = errno.ENOSYS
    if hasattr(libc, "renameat2"):
        old, new = os.fsencode(source), os.fsencode(target)
        if libc.renameat2(IN_WORKING_FOLDER, old, IN_WORKING_FOLDER, new, ctypes.c_uint(flags)) == 0:
            return
        code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _rename_in_steps(source: Path, target: Path) -> None:
    linked = False
    if not source.is_dir():
        try:
            target.hardlink_to(source)
            linked = True
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            pass
    if linked:
        source.unlink()
    elif os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(source), None, str(target))
    else:
        source.rename(target)
