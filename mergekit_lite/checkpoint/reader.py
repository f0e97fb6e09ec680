"""Read elements of tensors into buffers: the one call by which everything above gets weights."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch
from mergekit_lite.errors import RunError

REMEMBERED = 16
T = TypeVar("T")


class Reader:
    """Keeps the files of checkpoints open and fills buffers from them. Safe to use from many threads at once.

    Reads are positioned (``preadv``) straight into the caller's memory: nothing is mapped, so resident memory stays
    what the buffers are.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._remembered: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def fill(self, spec: TensorSpec, start: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes of the elements ``start …`` of a tensor, counted in row-major order.

        Args:
            spec: the tensor.
            start: index of the first element.
            out: bytes; their number says how many elements, of ``spec.dtype``.

        Raises:
            RunError: the file can't be read, or ends before its header says it does.
        """
        if spec.as_stored:
            self._fill(spec.file, spec.offset + start * dtypes.size(spec.dtype), out, spec.name)
        elif out:
            self.read(spec, start, tensor_of(out, spec.dtype))

    def read(self, spec: TensorSpec, start: int, out: torch.Tensor) -> None:
        """As ``fill``, for a 1-D contiguous CPU tensor of ``spec.dtype``."""
        if spec.change is not None:
            from mergekit_lite.checkpoint.summing import add_up

            add_up(self, spec, start, out)
        elif spec.scale is not None:
            from mergekit_lite.checkpoint.dequantisation import dequantise

            dequantise(self, spec, start, out)
        elif spec.strides is not None:
            self._read_strided(spec, start, out)
        else:
            self.fill(spec, start, bytes_of(out))

    def remembered(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make()`` gives, kept until so many others were asked for: for what is read again and again."""
        with self._lock:
            if key in self._remembered:
                self._remembered.move_to_end(key)
                found: T = self._remembered[key]
                return found
        made = make()
        with self._lock:
            self._remembered[key] = made
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return made

    def _descriptor(self, path: Path) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            with self._lock:
                if path not in self._descriptors:
                    try:
                        self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    except OSError as error:
                        raise RunError(f"{path}: can't be read: {error.strerror}") from error
                descriptor = self._descriptors[path]
        return descriptor

    def _fill(self, path: Path, offset: int, buffer: memoryview, name: str) -> None:
        descriptor = self._descriptor(path)
        while buffer:
            try:
                got = os.preadv(descriptor, [buffer], offset)
            except OSError as error:
                raise RunError(
                    f"{path}: reading tensor {name!r} at byte {offset:,} failed: {error.strerror}"
                ) from error
            if got == 0:
                raise RunError(
                    f"{path}: ends at byte {os.fstat(descriptor).st_size:,}, but its header says tensor {name!r} goes "
                    f"on at byte {offset:,}. It was cut short while it was read."
                )
            offset, buffer = offset + got, buffer[got:]

    def _read_strided(self, spec: TensorSpec, start: int, out: torch.Tensor) -> None:
        """A tensor that is not laid out row by row: its elements are scattered, so they are picked from a mapping."""
        assert spec.strides is not None
        index = torch.arange(start, start + out.numel())
        position = torch.zeros_like(index)
        for length, stride in zip(reversed(spec.shape), reversed(spec.strides), strict=True):
            position += index % length * stride
            index = index // length
        mapped = torch.from_file(str(spec.file), size=spec.file.stat().st_size, dtype=torch.uint8)
        reach = 1 + int(position.max()) if len(position) else 0
        stored = mapped[spec.offset : spec.offset + reach * out.element_size()]
        if spec.offset % out.element_size():
            stored = stored.clone()  # no view begins between two elements
        stored = stored.view(out.dtype)
        torch.index_select(stored, 0, position, out=out)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(torch.uint8).numpy().data


def tensor_of(data: memoryview, dtype: str) -> torch.Tensor:
    """Bytes in memory as a 1-D CPU tensor, which shares them."""
    kind = dtypes.torch_dtype(dtype)
    return torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
