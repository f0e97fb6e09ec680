"""Files that lie elsewhere, and the paths on this machine that stand in for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from mergekit_lite.checkpoint.stores.ranges import RangeFile
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.checkpoint.stores.source import DESCRIPTION
from mergekit_lite.input_files import StandIn


@dataclass(frozen=True)
class Mirror:
    """A folder that stands in for a URL, and the files that lie elsewhere by their paths in it."""

    url: str
    files: dict[str, RemoteFile]


_mirrors: dict[str, Mirror | None] = {}  # by the folder that holds a stand-in


class StorePath(StandIn):
    """A path that stands in for a URL: as text it is the URL, to the system it is the path.

    A pickled one takes along what it stands for, so that a process on another machine reads it as well.
    """

    def __str__(self) -> str:
        _, mirror, inner = self._place()
        if mirror is None:
            return os.fspath(self)
        return f"{mirror.url}/{inner}" if inner else mirror.url

    def __fspath__(self) -> str:
        path: str = os.path.join(*self.parts)  # noqa: PTH118  (pathlib would ask for the text)
        return path

    def iterdir(self) -> Iterator[StorePath]:
        """Yield what the folder holds; pathlib's own would list its text."""
        for name in os.listdir(self.__fspath__()):  # noqa: PTH208
            yield self / name

    def rglob(self, pattern: str, **options: Any) -> Iterator[StorePath]:
        """Yield what lies below; see ``iterdir``."""
        yield from (StorePath(path) for path in Path(self.__fspath__()).rglob(pattern, **options))

    def __reduce__(self) -> tuple[Any, ...]:
        root, mirror, inner = self._place()
        file = self.remote
        return _arrived, (self.__fspath__(), root, mirror.url if mirror else "", inner, file)

    @property
    def remote(self) -> RemoteFile | None:
        """The file that it stands for; None for a folder, and for a small file that lies here in full."""
        _, mirror, inner = self._place()
        return mirror.files.get(inner) if mirror else None

    def elsewhere(self) -> BinaryIO | None:
        """Open the file that it stands for, to be read in places; None where it lies here in full."""
        remote = self.remote
        return None if remote is None else cast(BinaryIO, RangeFile(remote))

    def _place(self) -> tuple[str, Mirror | None, str]:
        """Return the folder that holds the stand-in, what it stands for, and the path in the stand-in."""
        parts = self.parts
        for depth in range(len(parts) - 1, 1, -1):
            root = os.path.join(*parts[:depth])  # noqa: PTH118  (a path would ask for its own text)
            if (mirror := _mirror(root)) is not None:
                return root, mirror, "/".join(parts[depth + 1 :])
        return "", None, ""


def know(root: str, mirror: Mirror) -> None:
    """Keep what a folder stands for."""
    _mirrors[root] = mirror


def _mirror(root: str) -> Mirror | None:
    """Return what the folder ``root`` holds a stand-in of; None where it holds none."""
    if root not in _mirrors:
        try:
            with open(os.path.join(root, DESCRIPTION), encoding="utf-8") as file:  # noqa: PTH118, PTH123
                content = json.load(file)
            files = {name: RemoteFile(*each) for name, each in content["files"].items()}
            _mirrors[root] = Mirror(content["url"], files)
        except OSError:
            _mirrors[root] = None
    return _mirrors[root]


def _arrived(path: str, root: str, url: str, inner: str, file: RemoteFile | None) -> StorePath:
    """Return a path that another process sent, with what it stands for."""
    if root and url and _mirror(root) is None:
        know(root, Mirror(url, {}))
    if (mirror := _mirrors.get(root)) is not None and file is not None:
        mirror.files.setdefault(inner, file)
    return StorePath(path)
