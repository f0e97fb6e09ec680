"""Renames that never overwrite: they fail where the new name is taken, or exchange the two.

Linux does either in one step (renameat2, since 3.15, on most file systems). Elsewhere a file gets its second name by a
hard link, which fails where the name is taken; for a folder the name is checked right before the rename. A file that is
to be replaced is overwritten there, a folder moved away first: if a kill comes between, nothing has the name until a
run goes on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from mergekit_lite.c_library import c_function

IN_WORKING_FOLDER = -100  # AT_FDCWD: what relative paths are relative to
NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder. Raises OSError; FileExistsError where the new name is taken."""
    try:
        renameat2(source, target, NO_REPLACE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _rename_in_steps(source, target)


def replace(source: Path, target: Path, aside: Path) -> None:
    """Rename ``source`` to ``target``, and what has that name to ``source`` or ``aside``, if it is of the same kind.

    Raises OSError.
    """
    is_folder = source.is_dir()
    if is_folder and not (target.is_dir() or target.is_symlink()):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    if not is_folder and target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    try:
        renameat2(source, target, EXCHANGE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _replace_in_steps(source, target, aside)


def remove(path: Path) -> None:
    """Remove a folder with its content, a file or a link; do nothing where the path doesn't exist. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def renameat2(source: Path, target: Path, flags: int) -> None:
    """Rename as the system call does. Raises OSError; one of ``UNSUPPORTED`` where the system has no such call."""
    call, code = c_function("renameat2"), errno.ENOSYS
    if call is not None:
        old, new = os.fsencode(source), os.fsencode(target)
        if call(IN_WORKING_FOLDER, old, IN_WORKING_FOLDER, new, ctypes.c_uint(flags)) == 0:
            return
        code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _replace_in_steps(source: Path, target: Path, aside: Path) -> None:
    if not source.is_dir():
        with suppress(OSError):  # of a file system without hard links: a file is replaced in one step anyway
            aside.hardlink_to(target)
        source.replace(target)
        return
    remove(aside)
    target.rename(aside)
    try:
        source.rename(target)
    except OSError:
        aside.rename(target)
        raise


def _rename_in_steps(source: Path, target: Path) -> None:
    if not source.is_dir():
        try:
            target.hardlink_to(source)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            pass
        else:
            with suppress(OSError):  # the second name goes with the working folder
                source.unlink()
            return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(source), None, str(target))
    source.rename(target)
