"""A tensor whose elements are not laid out row by row: a transposed or sliced one in a torch file."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader, bytes_of, tensor_of
from mergekit_lite.checkpoint.tensor import Encoding, TensorSpec
from mergekit_lite.deferred import torch
from mergekit_lite.input_files import StandIn

PIECE = 1 << 20  # elements of a file elsewhere that are read at once


@dataclass(frozen=True, slots=True)
class Strided(Encoding):
    """Elements that are ``strides`` elements apart in the file, along each dimension."""

    strides: tuple[int, ...]

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Pick the elements, which are scattered, from a mapping of the file."""
        values = tensor_of(out, spec.dtype)
        if not out:
            return
        # Count each element's index through the dimensions, the last one first, and add up its distance from the first.
        index = torch.arange(start, start + values.numel())
        position = torch.zeros_like(index)
        for length, stride in zip(reversed(spec.shape), reversed(self.strides), strict=True):
            position += index % length * stride
            index = index // length
        if isinstance(spec.file, StandIn):
            self._gather(spec, reader, position, values)
            return
        mapped = torch.from_file(str(spec.file), size=spec.file.stat().st_size, dtype=torch.uint8)
        reach = 1 + int(position.max())
        stored = mapped[spec.offset : spec.offset + reach * values.element_size()]
        if spec.offset % values.element_size():
            stored = stored.clone()  # no view begins between two elements
        torch.index_select(stored.view(values.dtype), 0, position, out=values)

    def _gather(self, spec: TensorSpec, reader: Reader, position: torch.Tensor, values: torch.Tensor) -> None:
        """Pick the elements at some positions out of the stored ones, which are read piece by piece: none is mapped."""
        piece = torch.empty(PIECE, dtype=values.dtype)
        size = values.element_size()
        for begin in range(int(position.min()), int(position.max()) + 1, PIECE):
            end = min(begin + PIECE, int(position.max()) + 1)
            reader.fill(spec.file, spec.offset + begin * size, bytes_of(piece[: end - begin]), spec.name)
            wanted = (position >= begin) & (position < end)
            values[wanted] = piece[position[wanted] - begin]

    @property
    def key(self) -> tuple[object, ...]:
        """The strides."""
        return (self.strides,)


def transposed(spec: TensorSpec) -> TensorSpec:
    """Return the same matrix, plain or strided, with its rows as columns."""
    return viewed(spec, 0, spec.shape[::-1], strides_of(spec)[::-1])


def viewed(spec: TensorSpec, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorSpec:
    """Return a view of a tensor's stored elements that begins ``first`` elements behind where the tensor does."""
    offset = spec.offset + first * dtypes.size(spec.dtype)
    return replace(spec, shape=shape, offset=offset, encoding=Strided(strides))


def strides_of(spec: TensorSpec) -> tuple[int, ...]:
    """Return how many elements apart the elements of a plain or strided tensor are stored, along each dimension."""
    if isinstance(spec.encoding, Strided):
        return spec.encoding.strides
    return tuple(math.prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape)))
