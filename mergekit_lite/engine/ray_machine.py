"""What runs on a machine of a Ray cluster: a worker, and its look around before it gets a task.

It looks whether the machine has our version, sees the inputs, and can write to the working folder: a copy of the same
name on a disk of its own is another file.
"""

from __future__ import annotations

import os
import pickle
import platform
import sys
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import xxhash

from mergekit_lite._version import __version__
from mergekit_lite.checkpoint.stores.addresses import is_elsewhere
from mergekit_lite.engine.news import MADE
from mergekit_lite.engine.pool import tuned_process
from mergekit_lite.engine.processes import LooksAhead, sendable
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.object_stores import Place, parse_place
from mergekit_lite.ops import c_ops
from mergekit_lite.output.remote_target import RemoteFolder

OWN_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
File = tuple[str, int, int]  # path, size, time


class Needs(NamedTuple):
    """What a machine has to have and to see before it gets a task."""

    identity: tuple[str, ...]
    files: Sequence[File] = ()  # the inputs
    marks: Sequence[tuple[str, str]] = ()  # a file in each working folder, or beside an output in a store, and its text


class RayWorker:
    """A worker: it lives in a process of its own on some machine of the cluster, and computes with one thread."""

    def __init__(self) -> None:
        for name in OWN_THREADS:
            os.environ[name] = "1"
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        self._tuning = tuned_process(with_torch=False)
        self._tuning.__enter__()  # until the process ends
        self._own = threading.local()  # what each thread does its tasks by, and the number of the round it is for

    def look(self, needs: bytes) -> str:
        """Return what keeps this machine from doing the tasks; empty where nothing does."""
        return _missing(pickle.loads(needs))

    def news(self) -> int:
        """Return the bytes that were read for what was made so far in this round."""
        return MADE.nbytes

    def do(self, number: int, job: bytes, task: bytes) -> bytes:
        """Do a task of a round, and return the result, or the failure."""
        try:
            MADE.begin(number)
            if getattr(self._own, "number", 0) != number:
                self._own.do = pickle.loads(zlib.decompress(job))()
                self._own.number = number
            given = pickle.loads(zlib.decompress(task))
            if isinstance(self._own.do, LooksAhead):
                self._own.do.expect(given)
            return pickle.dumps((self._own.do(given), None))
        except BaseException as failure:
            return pickle.dumps((None, sendable(failure)))


@cache
def identity() -> tuple[str, ...]:
    """Return what has to be the same on all machines for the bytes to be the same: versions and our own sources."""
    sources = xxhash.xxh3_64()
    package = Path(__file__).parents[1]
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.c")]):
        sources.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    kernels = "with" if c_ops.compiled() is not None else "without"
    return (
        f"mergekit_lite {__version__} (sources {sources.hexdigest()[:8]}, {kernels} compiled kernels)",
        *(f"{name} {metadata.version(name)}" for name in ("torch", "numpy")),
        f"a processor of kind {platform.machine()}",
    )


def _missing(needs: Needs) -> str:
    """Return what a machine lacks: another version, or a file that isn't there or is another one."""
    for ours, here in zip(needs.identity, identity(), strict=True):
        if ours != here:
            return f"has {here}, this machine has {ours}. Install the same there"
    for path, size, mtime_ns in needs.files:
        if is_elsewhere(path):
            continue  # it lies in no file system, and its reader holds it to what the plan knows of it
        try:
            status = Path(path).stat()
        except OSError as error:
            where = f"the input {path} ({error.strerror})"
            return f"doesn't see {where}. Inputs have to be on a file system that all machines share"
        if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
            return (
                f"sees another file under {path} (its size or time differs). Inputs have to be shared by all machines"
            )
    for path, text in needs.marks:
        if is_elsewhere(path):
            if why := _out_of_reach(parse_place(path), text):
                return why
            continue
        seen = ""
        with suppress(OSError, ValueError):
            seen = Path(path).read_text(encoding="utf-8")
        if seen != text or not os.access(Path(path).parent, os.W_OK):
            where = f"the working folder {Path(path).parent}, or can't write there"
            return f"doesn't see {where}. OUTPUT has to be on a file system that all machines share"
    return ""


def _out_of_reach(mark: Place, text: str) -> str:
    """Return what keeps this machine from writing where an object lies that holds a text; empty where nothing does."""
    beside = f"the place {mark.folder}"
    own = f"probe-{os.urandom(8).hex()}"
    try:
        folder = RemoteFolder(mark.folder, hurried=True)
        if not (folder.get(mark.name) or b"").startswith(text.encode()):  # signs of life follow
            return f"sees another {mark.scheme}://{mark.bucket} (its environment names another store)"
        folder.put(own, b"")
        folder.delete(own)
    except MergekitLiteError as error:
        return f"can't write to {beside}: {error}"
    return ""
