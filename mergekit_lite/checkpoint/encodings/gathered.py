"""Rows gathered from one or several matrices: a vocabulary in another order, or with tokens of other models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.deferred import np

if TYPE_CHECKING:
    import numpy.typing as npt

Place = tuple[int, int]  # the number of a matrix, and a row in it


@dataclass(frozen=True, slots=True, eq=False)
class Gathered(Encoding):
    """For each row where it lies: one row of one matrix, or the mean of several; nothing gives zeros.

    ``matrix`` and ``row`` (both int32) have an entry for each row. Where ``matrix`` is negative, −1 − n, the row is the
    mean of the places ``means[n]``.
    """

    sources: tuple[TensorSpec, ...]  # of one width
    matrix: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    means: tuple[tuple[Place, ...], ...] = ()

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return what the elements of the first matrix are on disk."""
        return self.sources[0].stored_dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes of ``count`` elements of the first matrix."""
        return self.sources[0].stored_bytes(count)

    @property
    def block(self) -> Block | None:
        """None: rows of a matrix with scales of blocks are gathered as values."""
        return None

    @property
    def key(self) -> tuple[object, ...]:
        """The matrices, and which row is from where."""
        places = xxhash.xxh3_128(self.matrix.tobytes() + self.row.tobytes() + repr(self.means).encode()).hexdigest()
        return "Gathered", tuple(source.key for source in self.sources), places

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read runs of rows that follow each other in one matrix at once, straight into ``out``."""
        columns = spec.numel // spec.shape[0]
        size = dtypes.size(spec.dtype)
        end = start + len(out) // size
        at = start
        while at < end:
            row = at // columns
            rows = self._run(row, -(-end // columns))
            upto = min(end, (row + rows) * columns)
            part = out[(at - start) * size : (upto - start) * size]
            self._fill_run(spec, reader, row, at - row * columns, part)
            at = upto

    def _run(self, row: int, end: int) -> int:
        """Return how many rows from ``row`` on, ``end`` at most, follow each other in one matrix; 1 for a mean."""
        matrix = self.matrix[row:end]
        if matrix[0] < 0:
            return 1
        follows = (matrix[1:] == matrix[0]) & (np.diff(self.row[row:end]) == 1)
        return int(np.argmin(follows)) + 1 if not follows.all() else len(matrix)

    def _fill_run(self, spec: TensorSpec, reader: Reader, row: int, column: int, out: memoryview) -> None:
        """Fill ``out`` with the elements of a run that begins at a row, from a column on."""
        columns = spec.numel // spec.shape[0]
        count = len(out) // dtypes.size(spec.dtype)
        number = int(self.matrix[row])
        if number < 0:
            places = self.means[-1 - number]
            values = tensor_of(out, spec.dtype)
            total = values.double().zero_()
            for matrix, source_row in places:
                total += self.sources[matrix].elements(reader, source_row * columns + column, count).double()
            values.copy_(total / max(1, len(places)))
            return
        source, first = self.sources[number], int(self.row[row]) * columns + column
        if source.dtype == spec.dtype:
            source.fill(reader, first, out)
        else:
            tensor_of(out, spec.dtype).copy_(source.elements(reader, first, count))


def gathered(own: TensorSpec, sources: Sequence[TensorSpec], places: Sequence[Place | tuple[Place, ...]]) -> TensorSpec:
    """Return ``own`` with other rows: each from a place in the ``sources``, or the mean of several places.

    Its dtype is the one that holds what all sources hold, so that no row is rounded.
    """
    means: dict[tuple[Place, ...], int] = {}
    matrix, row = np.empty(len(places), np.int32), np.zeros(len(places), np.int32)
    for number, place in enumerate(places):
        if place and isinstance(place[0], int):
            matrix[number], row[number] = place
        else:
            matrix[number] = -1 - means.setdefault(place, len(means))
    dtype = dtypes.promoted(source.dtype for source in sources)
    encoding = Gathered(tuple(sources), matrix, row, tuple(means))
    shape = (len(places), *own.shape[1:])
    return replace(own, shape=shape, dtype=dtype, encoding=encoding)
