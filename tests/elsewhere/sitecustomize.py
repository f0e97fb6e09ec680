"""Takes from Python what it lacks on Windows, as far as Linux can play that: put this folder on PYTHONPATH.

The package sees an ``os`` called "nt" without the calls, flags and signals that only POSIX has, no ``fcntl``, no
``resource``, and no C library of the process. For everybody open files can't be renamed or removed, folders can't be
opened, a rename replaces nothing, and a new process gets its standard streams alone. Libraries keep their modules: they
know these systems by themselves.
"""
# ruff: noqa: PTH112, PTH113, PTH115, PTH118, PTH119, PTH120

import builtins
import ctypes
import errno
import os
import subprocess
import threading
import time
import types
from collections.abc import Callable
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import filelock
from lacking import LACKING, MISSING  # beside this file

filelock.lock_descriptor  # noqa: B018  (imported while all is there)


def without(module: types.ModuleType, names: str) -> types.ModuleType:
    """A module that looks like another but for some names."""
    bare = types.ModuleType(module.__name__)
    bare.__dict__.update({name: value for name, value in vars(module).items() if name not in names.split()})
    return bare


SEEN = {name: without(import_module(name), names) for name, names in LACKING.items()}
SEEN["os"].name = "nt"  # type: ignore[attr-defined]
real_import = builtins.__import__


def limited_import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """Import for the package as Windows would; for all others as usual."""
    if level == 0 and str((globals or {}).get("__name__")).partition(".")[0] == "mergekit_lite":
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in SEEN:
            return SEEN[name]
    return real_import(name, globals, locals, fromlist, level)


def open_here(path: os.PathLike[str] | str) -> bool:
    """Whether this process has a file open that lies at or below a path."""
    wanted = os.path.join(os.path.realpath(os.path.dirname(os.fspath(path))), os.path.basename(os.fspath(path)))
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target == wanted or target.startswith(f"{wanted}/"):
            return True
    return False


def refusing(call: Callable[..., Any], *, replaces: bool = True) -> Callable[..., Any]:
    """A call that changes names, but not those of open files, nor of what has the new name if it isn't to."""

    def refusal(*paths: Any, **options: Any) -> Any:
        for path in paths:
            if open_here(path):
                raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used", path)
        if len(paths) == 2 and os.path.lexists(paths[1]) and not (replaces and os.path.isfile(paths[1])):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", *paths)
        return call(*paths, **options)

    return refusal


def opening(path: Any, *arguments: Any, **options: Any) -> int:
    """Open no folder, as C's library on Windows."""
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return real_open(path, *arguments, **options)


def loading(self: Any, name: Any, *arguments: Any, **options: Any) -> None:
    """Load a library by its name."""
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    real_loading(self, name, *arguments, **options)


def starting(self: Any, *arguments: Any, **options: Any) -> None:
    """Start a process."""
    for name in ("pass_fds", "preexec_fn"):
        if options.get(name):
            raise ValueError(f"{name} is not supported on Windows")
    real_starting(self, *arguments, **options)


def seeking(*arguments: Any) -> int:
    """Set a place in a file, in workers ``SEEKS`` times at most: then the process waits to be killed."""
    is_worker = threading.current_thread() is not threading.main_thread()
    if is_worker and next(seeks) >= int(os.environ.get("SEEKS", 1 << 30)):
        time.sleep(3600)
    return real_seek(*arguments)


seeks = count()
real_open, real_seek, real_loading, real_starting = os.open, os.lseek, ctypes.CDLL.__init__, subprocess.Popen.__init__
builtins.__import__ = limited_import
SEEN["os"].open, SEEN["os"].lseek = opening, seeking  # type: ignore[attr-defined]
for module in (os, SEEN["os"]):
    for name in ("rename", "replace", "unlink", "remove"):
        setattr(module, name, refusing(vars(os)[name], replaces=name != "rename"))
ctypes.CDLL.__init__ = loading  # type: ignore[method-assign]
subprocess.Popen.__init__ = starting  # type: ignore[method-assign]
