"""Read bytes of files into buffers: what every tensor's elements are read with."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from mergekit_lite import dtypes, positioned
from mergekit_lite.checkpoint.stores.files import StorePath
from mergekit_lite.checkpoint.stores.read_ahead import BlockReader, Extent
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.deferred import torch
from mergekit_lite.errors import RunError

REMEMBERED = 16
T = TypeVar("T")


class Reader:
    """The open files of checkpoints, and what was computed from them lately. Many threads may use it at once.

    Reads are positioned, straight into the caller's memory: nothing is mapped, so resident memory stays
    what the buffers are. What lies elsewhere is fetched, ahead where it was said what will be read; each thread has
    blocks of its own.
    """

    def __init__(self) -> None:
        self._remote: dict[Path, RemoteFile | None] = {}
        self._blocks = threading.local()
        self._block_readers: list[BlockReader] = []
        self._descriptors: dict[Path, int] = {}
        self._remembered: OrderedDict[Hashable, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        for blocks in self._block_readers:
            blocks.close()

    def expect(self, extents: Iterable[tuple[Path, int, int, int]], *, again: bool = False) -> None:
        """Say which bytes this thread will read next: file, begin, end, and turn, as ``BlockReader.expect``."""
        elsewhere = [
            Extent(file, begin, end, turn)
            for path, begin, end, turn in extents
            if isinstance(path, StorePath) and (file := self._remote_of(path)) is not None
        ]
        if elsewhere:
            self._block_reader().expect(elsewhere, again=again)

    def fill(self, path: Path, offset: int, out: memoryview, tensor: str) -> None:
        """Fill ``out``, to its end, with the bytes of a file from ``offset`` on, for a tensor that errors name.

        Raises RunError where the file can't be read, or ends before its header says it does.
        """
        if isinstance(path, StorePath) and (file := self._remote_of(path)) is not None:
            self._block_reader().fill(file, offset, out)
            return
        descriptor = self._descriptor(path)
        while out:
            try:
                count = positioned.read(descriptor, out, offset)
            except OSError as error:
                raise RunError(
                    f"{path}: reading tensor {tensor!r} at byte {offset:,} failed: {error.strerror}"
                ) from error
            if count == 0:
                raise RunError(
                    f"{path}: ends at byte {os.fstat(descriptor).st_size:,}, but its header says tensor {tensor!r} "
                    f"goes on at byte {offset:,}. It was cut short while it was read."
                )
            offset, out = offset + count, out[count:]

    def fill_parts(self, path: Path, parts: Sequence[tuple[int, memoryview]], tensor: str) -> None:
        """Fill several buffers from places of a file, each given with its first byte; see ``fill``.

        Of a file elsewhere they are fetched together.
        """
        if isinstance(path, StorePath) and (file := self._remote_of(path)) is not None:
            self._block_reader().fill_parts(file, parts)
            return
        for offset, out in positioned.read_whole(self._descriptor(path), parts):
            self.fill(path, offset, out, tensor)  # the rest, or the error

    def remembered(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return ``make()``, or its earlier result for this key: the last 16 that were asked for are remembered.

        Threads that ask for the same at once wait for the one that makes it.
        """
        with self._lock:
            found: Future[T] | None = self._remembered.get(key)
            result = self._remembered[key] = found or Future()
            self._remembered.move_to_end(key)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        if found is None:
            try:
                result.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._remembered.pop(key, None)
                result.set_exception(error)
        return result.result()

    def _remote_of(self, path: StorePath) -> RemoteFile | None:
        if path not in self._remote:
            self._remote[path] = path.remote
        return self._remote[path]

    def _block_reader(self) -> BlockReader:
        if not hasattr(self._blocks, "reader"):
            self._blocks.reader = BlockReader()
            with self._lock:
                self._block_readers.append(self._blocks.reader)
        reader: BlockReader = self._blocks.reader
        return reader

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = positioned.open_file(path, os.O_RDONLY)
                except OSError as error:
                    raise RunError(f"{path}: can't be read: {error.strerror}") from error
            return self._descriptors[path]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return tensor.view(torch.uint8).numpy().data


def tensor_of(data: memoryview, dtype: str) -> torch.Tensor:
    """Return bytes in memory as a 1-D CPU tensor, which shares them."""
    kind = dtypes.torch_dtype(dtype)
    return torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
