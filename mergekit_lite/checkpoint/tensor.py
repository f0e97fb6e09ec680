"""A tensor of a checkpoint: what the headers say of it, and how its elements are read.

Most tensors lie in their file as they are (``Plain``); the other encodings have files in ``checkpoint/encodings``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.deferred import torch

Block = tuple[int, int]  # rows, columns


class Encoding(ABC):
    """How the elements of a tensor are stored. Only ``fill`` has to be given; the rest is that of a plain tensor.

    An encoding is a small frozen dataclass with slots: a checkpoint has one for every tensor that isn't plain.
    """

    __slots__ = ()

    @abstractmethod
    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Fill ``out`` with the elements of ``spec`` from ``start`` on, counted in row-major order.

        The length of ``out``, in bytes, says how many elements of ``spec.dtype`` are wanted. Raises RunError where a
        file can't be read, or ends before its header says it does, or is damaged.
        """

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the name of what is on disk for an element."""
        return spec.dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes on disk of ``count`` elements."""
        return count * dtypes.size(self.stored_dtype(spec))

    def all_bytes(self, spec: TensorSpec) -> int:
        """Return the bytes on disk of everything the tensor is made of."""
        return self.stored_bytes(spec, spec.numel)

    @property
    def block(self) -> Block | None:
        """The rows and columns that share a scale, where codes are stored; None where values are."""
        return None

    @property
    def is_quantised(self) -> bool:
        """Whether codes are dequantised when it is read."""
        return self.block is not None

    @property
    def scheme(self) -> str | None:
        """The name of the scheme that it was quantised by, as users know it; None where there is none."""
        return None

    def needs_torch(self, spec: TensorSpec) -> bool:
        """Return whether torch has a part in reading a tensor."""
        return True

    @property
    def is_shared(self) -> bool:
        """Whether much is remembered to read it, which workers should have together: threads, not processes."""
        return False

    @property
    def key(self) -> tuple[object, ...]:
        """Plain data that is equal for two encodings only where they make equal values of equal files."""
        return (None,)


@dataclass(frozen=True, slots=True)
class Plain(Encoding):
    """The elements lie in the file one after another, as they are read."""

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read straight into ``out``; torch is not needed."""
        reader.fill(spec.file, spec.offset + start * dtypes.size(spec.dtype), out, spec.name)

    def needs_torch(self, spec: TensorSpec) -> bool:
        """Return False: its bytes are read as they are."""
        return False


PLAIN = Plain()  # the one that all plain tensors share


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its name, dtype and shape, where its bytes lie, and how they are stored."""

    name: str
    dtype: str  # what a reader gets
    shape: tuple[int, ...]
    file: Path  # where it lies; of a sum, the base's
    offset: int  # the byte at which it begins there
    encoding: Encoding = PLAIN
    written_as: str | None = None  # the dtype it takes in an output unless another is asked for, if not ``dtype``

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether its elements lie in its file one after another, as they are read."""
        return isinstance(self.encoding, Plain)

    @property
    def stored_dtype(self) -> str:
        """The name of what is on disk for an element."""
        return self.encoding.stored_dtype(self)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, those of what is added to it included."""
        return self.encoding.all_bytes(self)

    @property
    def quantised(self) -> bool:
        """Whether it is dequantised when it is read."""
        return self.encoding.is_quantised

    @property
    def key(self) -> tuple[object, ...]:
        """Plain data that identifies the bytes it is read from, and what is done to them."""
        return (self.name, self.dtype, self.file.name, self.offset, *self.encoding.key)

    def stored_bytes(self, count: int) -> int:
        """Return the bytes on disk of ``count`` of its elements."""
        return self.encoding.stored_bytes(self, count)

    def fill(self, reader: Reader, start: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes of the elements from ``start`` on; see ``Encoding.fill``."""
        self.encoding.fill(self, reader, start, out)

    def read(self, reader: Reader, start: int, out: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor of ``dtype`` with the elements ``start …``; errors as in ``fill``."""
        self.fill(reader, start, bytes_of(out))

    def elements(self, reader: Reader, start: int, count: int) -> torch.Tensor:
        """Return ``count`` elements from ``start`` on: 1-D, of ``dtype``; errors as in ``fill``."""
        out = torch.empty(count, dtype=dtypes.torch_dtype(self.dtype))
        self.read(reader, start, out)
        return out
