"""Tensors that are a part of another one, or put together from others: experts in one tensor, and each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.derived import Derived
from mergekit_lite.checkpoint.encodings.pieces import by_rows, pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec


@dataclass(frozen=True, slots=True)
class _Parts(Encoding):
    """What both ways to put tensors together have in common."""

    parts: tuple[TensorSpec, ...]  # of one dtype

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype that the first part is stored in."""
        return self.parts[0].stored_dtype

    def all_bytes(self, spec: TensorSpec) -> int:
        """Return the bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def block(self) -> Block | None:
        """The block of the first part."""
        return self.parts[0].encoding.block

    @property
    def key(self) -> tuple[object, ...]:
        """The kind, and the parts."""
        return type(self).__name__, tuple(part.key for part in self.parts)


@dataclass(frozen=True, slots=True)
class Joined(_Parts):
    """Parts whose elements stand one after another, as matrices in a stack or rows of one matrix do."""

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Let each part fill the elements that are its own."""
        size = dtypes.size(spec.dtype)
        begin, end = 0, start + len(out) // size
        for part in self.parts:
            first, last = max(start, begin), min(end, begin + part.numel)
            if first < last:
                part.fill(reader, first - begin, out[(first - start) * size : (last - start) * size])
            begin += part.numel


@dataclass(frozen=True, slots=True)
class SideBySide(_Parts):
    """Matrices of the same number of rows, next to each other."""

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read the rows of each matrix, and copy them into its columns."""
        for begin, piece in pieces(start, out, spec.dtype):
            for row, column, rows in by_rows(begin, piece, spec.shape[-1]):
                left = 0  # the column at which a part begins
                for part in self.parts:
                    width = part.shape[1]
                    first, last = max(column, left), min(column + rows.shape[1], left + width)
                    if first < last:  # of one row it may be some columns, of several it is all
                        elements = part.elements(reader, row * width + first - left, len(rows) * (last - first))
                        rows[:, first - column : last - column] = elements.view(len(rows), -1)
                    left += width


@dataclass(frozen=True, slots=True)
class Run(Derived):
    """Elements of another tensor, from ``begin`` on."""

    begin: int

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Let the other tensor fill them."""
        self.stored.fill(reader, self.begin + start, out)

    @property
    def key(self) -> tuple[object, ...]:
        """The other tensor, and where the run begins."""
        return self.stored.key, self.begin


def joined(parts: Sequence[TensorSpec], shape: tuple[int, ...]) -> TensorSpec:
    """Return the tensor of this shape in which the elements of the parts follow each other."""
    return replace(parts[0], shape=shape, encoding=Joined(tuple(parts)))


def side_by_side(parts: Sequence[TensorSpec]) -> TensorSpec:
    """Return the matrix that has the columns of the first part, then those of the next ones."""
    if len(parts) == 1:
        return parts[0]
    rows, columns = parts[0].shape[0], sum(part.shape[1] for part in parts)
    return replace(parts[0], shape=(rows, columns), encoding=SideBySide(tuple(parts)))


def run_of(whole: TensorSpec, begin: int, shape: tuple[int, ...]) -> TensorSpec:
    """Return the tensor of this shape whose elements are those of another from ``begin`` on."""
    if whole.is_plain:
        return replace(whole, shape=shape, offset=whole.offset + begin * dtypes.size(whole.dtype))
    return replace(whole, shape=shape, encoding=Run(whole, begin))
