"""Rows gathered from one or several matrices: a vocabulary in another order, or with tokens of other models."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.block_scaled import BlockScaled, grid
from mergekit_lite.checkpoint.encodings.dense import Dense
from mergekit_lite.checkpoint.encodings.ggml import GgmlBlocks
from mergekit_lite.checkpoint.encodings.pieces import PIECE
from mergekit_lite.checkpoint.encodings.sum import Sum, Term
from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.deferred import np, torch

if TYPE_CHECKING:
    import numpy.typing as npt

Place = tuple[int, int]  # the number of a matrix, and a row in it


class Places(NamedTuple):
    """For each row where it lies: in which matrix, and which row of that (both int32).

    Where ``matrix`` is negative, −1 − n, the row is the mean of the places ``means[n]``; of none it is zeros.
    """

    matrix: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    means: tuple[tuple[Place, ...], ...] = ()

    def part(self, begin: int, end: int) -> Places:
        """Return the places of some rows, with only the means that those are."""
        matrix = self.matrix[begin:end].copy()
        is_mean = matrix < 0
        used = _numbers_in(-1 - matrix[is_mean])
        matrix[is_mean] = -1 - np.searchsorted(used, -1 - matrix[is_mean])
        return Places(matrix, self.row[begin:end].copy(), tuple([self.means[number] for number in used]))

    def without(self, lacking: Collection[int]) -> Places:
        """Return the places with zeros, or the mean of the others, for rows of matrices that are not there."""
        kept = [tuple([place for place in mean if place[0] not in lacking]) for mean in self.means]
        is_lost = np.isin(self.matrix, list(lacking))
        matrix = np.where(is_lost, -1 - len(kept), self.matrix).astype(np.int32)
        return Places(matrix, np.where(is_lost, 0, self.row).astype(np.int32), (*kept, ()))

    def runs(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first, last + 1, matrix, row) of rows that follow each other in one matrix, a mean by itself."""
        matrix, row = self.matrix[begin:end], self.row[begin:end]
        follows = (matrix[1:] == matrix[:-1]) & (matrix[1:] >= 0) & (row[1:] - row[:-1] == 1)
        firsts = np.concatenate(([0], np.flatnonzero(~follows) + 1))
        bounds = [*firsts.tolist(), len(matrix)]
        for (first, last), number, at in zip(
            pairwise(bounds), matrix[firsts].tolist(), row[firsts].tolist(), strict=True
        ):
            yield begin + first, begin + last, number, at


@dataclass(frozen=True, slots=True, eq=False)
class Gathered(Encoding):
    """Rows by their places in the ``sources``, which are of one width; the first of the ``places`` is of row ``first``.

    Rows before it, and behind the last of them, can't be read.
    """

    sources: tuple[TensorSpec, ...]
    places: Places
    first: int = 0

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
    def is_quantised(self) -> bool:
        """Whether any of the matrices is."""
        return any(source.quantised for source in self.sources)

    @property
    def key(self) -> tuple[object, ...]:
        """The matrices, and which row is from where."""
        matrix, row, means = self.places
        places = xxhash.xxh3_128(matrix.tobytes() + row.tobytes() + repr(means).encode()).hexdigest()
        return "Gathered", tuple(source.key for source in self.sources), places

    def needs_torch(self, spec: TensorSpec) -> bool:
        """Return whether torch has a part in reading: not where rows are bytes of files as they are wanted."""
        matrix = self.places.matrix
        used = [self.sources[number] for number in _numbers_in(matrix)]
        return any(self.places.means) or not all(each.is_plain and each.dtype == spec.dtype for each in used)

    def part(self, spec: TensorSpec, begin: int, end: int) -> Gathered:
        """Return what reads the elements ``begin … end`` and no others: with every span of a tensor travels its own."""
        columns = spec.numel // spec.shape[0]
        first = begin // columns
        return replace(self, places=self.places.part(first - self.first, -(-end // columns) - self.first), first=first)

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Fill a partial first row, whole rows in blocks, and a partial last row."""
        columns, size = spec.numel // spec.shape[0], dtypes.size(spec.dtype)
        while out:
            row, column = divmod(start, columns)
            left = len(out) // size
            count = min(columns - column, left)
            if count == columns:
                count *= min(left // columns, max(1, PIECE // columns))
            self._fill_rows(spec, reader, row - self.first, column, out[: count * size])
            start, out = start + count, out[count * size :]

    def _fill_rows(self, spec: TensorSpec, reader: Reader, row: int, column: int, out: memoryview) -> None:
        """Fill ``out`` with whole rows from ``row`` on, or with a part of one from ``column`` on.

        What lies in a file as it is wanted is read straight into ``out``, by one call for each matrix, in the file's
        order; of other matrices all rows are made at once where their encodings allow it.
        """
        columns, size = spec.numel // spec.shape[0], dtypes.size(spec.dtype)
        width = min(columns - column, len(out) // size)
        end = row + len(out) // (width * size)
        made = self._fill_encoded(spec, reader, row, end, out) if width == columns else set()
        stored: dict[int, list[tuple[int, memoryview]]] = {}
        for begin, upto, number, at in self.places.runs(row, end):
            part = out[(begin - row) * width * size : (upto - row) * width * size]
            if number in made:
                continue
            if number < 0:
                self._fill_mean(spec, reader, self.places.means[-1 - number], column, part)
            elif (source := self.sources[number]).is_plain and source.dtype == spec.dtype:
                stored.setdefault(number, []).append((source.offset + (at * columns + column) * size, part))
            else:
                values = source.elements(reader, at * columns + column, len(part) // size)
                tensor_of(part, spec.dtype).copy_(values)
        for number, parts in stored.items():
            parts.sort(key=itemgetter(0))
            reader.fill_parts(self.sources[number].file, parts, self.sources[number].name)

    def _fill_encoded(self, spec: TensorSpec, reader: Reader, row: int, end: int, out: memoryview) -> set[int]:
        """Fill the rows of each matrix of which rows are made at once; return which matrices those are."""
        matrix, rows = self.places.matrix[row:end], self.places.row[row:end]
        made: set[int] = set()
        for number in _numbers_in(matrix):
            source = self.sources[number]
            if source.is_plain and source.dtype == spec.dtype:
                continue
            places = np.flatnonzero(matrix == number)
            if (found := rows_of(source, rows[places])) is not None:
                values = found.elements(reader, 0, found.numel).view(len(places), -1)
                whole = tensor_of(out, spec.dtype).view(len(matrix), -1)
                whole[torch.from_numpy(places)] = values.to(whole.dtype)
                made.add(number)
        return made

    def _fill_mean(
        self, spec: TensorSpec, reader: Reader, places: Sequence[Place], column: int, out: memoryview
    ) -> None:
        if not places:
            np.frombuffer(out, np.uint8)[:] = 0
            return
        columns = spec.numel // spec.shape[0]
        values = tensor_of(out, spec.dtype)
        total = values.double().zero_()
        for matrix, row in places:
            total += self.sources[matrix].elements(reader, row * columns + column, len(values)).double()
        values.copy_(total / len(places))


def gathered(own: TensorSpec, sources: Sequence[TensorSpec], places: Places) -> TensorSpec:
    """Return ``own`` with other rows, each from its place in the ``sources``.

    Its dtype is the one that holds what all sources of a row hold, so that no row is rounded.
    """
    in_means = {matrix for mean in places.means for matrix, _ in mean}
    used = sorted({*_numbers_in(places.matrix), *in_means})
    dtype = dtypes.promoted([sources[number].dtype for number in used]) if used else own.dtype
    shape = (len(places.matrix), *own.shape[1:])
    return replace(own, shape=shape, dtype=dtype, encoding=Gathered(tuple(sources), places))


def rows_of(spec: TensorSpec, rows: npt.NDArray[np.int32]) -> TensorSpec | None:
    """Return some rows of a matrix as a tensor that reads them at once; None where its encoding has no rows by itself.

    Codes are gathered as codes, and with each its scales: a block of the result is one row high.
    """
    encoding, shape = spec.encoding, (len(rows), *spec.shape[1:])
    if spec.is_plain:
        return _plain_rows(spec, rows)
    if isinstance(encoding, GgmlBlocks):
        return replace(spec, shape=shape, encoding=replace(encoding, rows=tuple(rows.tolist())))
    if isinstance(encoding, Sum) and encoding.base is None:  # the differences of a task vector
        terms = [term for term in encoding.terms if isinstance(term, Dense) and term.values.is_plain]
        if len(terms) < len(encoding.terms):
            return None
        moved = tuple([replace(term, values=_plain_rows(term.values, rows)) for term in terms])
        return replace(spec, shape=shape, encoding=replace(encoding, terms=moved))
    if not isinstance(encoding, BlockScaled) or len(spec.shape) != 2:
        return None
    scale, zero_point, (height, width) = encoding.scale, encoding.zero_point, encoding.block
    if not all(part.is_plain for part in (encoding.codes, scale, zero_point) if part is not None):
        return None
    of_blocks = grid((spec.shape[0], spec.shape[1]), encoding.block)

    def of_rows(numbers: TensorSpec) -> TensorSpec:
        return numbers if numbers.numel == 1 else _plain_rows(replace(numbers, shape=of_blocks), rows // height)

    gathered_codes = replace(
        encoding,
        codes=_plain_rows(encoding.codes, rows),
        scale=of_rows(scale),
        block=(1, width),
        zero_point=None if zero_point is None else of_rows(zero_point),
    )
    return replace(spec, shape=shape, encoding=gathered_codes)


def _numbers_in(numbers: npt.NDArray[np.int32]) -> list[int]:
    """Return which numbers from 0 on are among some small ones, ascending."""
    found: list[int] = np.flatnonzero(np.bincount(numbers[numbers >= 0])).tolist()
    return found


def _plain_rows(spec: TensorSpec, rows: npt.NDArray[np.int32]) -> TensorSpec:
    places = Places(np.zeros(len(rows), np.int32), rows)
    return replace(spec, shape=(len(rows), *spec.shape[1:]), encoding=Gathered((spec,), places))


def part_of(spec: TensorSpec, begin: int, end: int) -> TensorSpec:
    """Return a tensor of which only the elements ``begin … end`` are read, without what the others need."""
    encoding = spec.encoding
    if isinstance(encoding, Gathered):
        return replace(spec, encoding=encoding.part(spec, begin, end))
    if isinstance(encoding, Sum) and any(map(_is_gathered, encoding.terms)):
        terms = [
            replace(term, values=part_of(term.values, begin, end)) if _is_gathered(term) else term
            for term in encoding.terms
        ]
        return replace(spec, encoding=replace(encoding, terms=tuple(terms)))
    return spec


def _is_gathered(term: Term) -> TypeGuard[Dense]:
    return isinstance(term, Dense) and isinstance(term.values.encoding, Gathered)
