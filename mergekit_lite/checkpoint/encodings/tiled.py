"""A tensor in pieces, as trainers on many processes store it: each has a block of it, or a run of its elements.

The pieces tile the tensor. A run of rows is read straight from its piece; of pieces that have some columns each, rows
are read into a buffer and copied to their places.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.pieces import PIECE
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Encoding, TensorSpec
from mergekit_lite.deferred import np

Shape = tuple[int, ...]


class Tile(NamedTuple):
    """One piece: where in the tensor its first element is, along each dimension, and where it is stored."""

    start: Shape
    spec: TensorSpec  # its shape is that of the piece


@dataclass(frozen=True, slots=True)
class Tiled(Encoding):
    """Pieces that have every element of a tensor of the shape ``grid`` once."""

    grid: Shape  # as many elements as the tensor; (elements,) where the pieces are runs
    tiles: tuple[Tile, ...]

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read each piece's part of the elements into its place."""
        size = dtypes.size(spec.dtype)
        cut = self._cut
        columns = math.prod(self.grid[cut:])
        for done in range(0, len(out), PIECE * size):
            self._fill_piece(reader, start + done // size, out[done : done + PIECE * size], columns, cut, size)

    @property
    def key(self) -> tuple[object, ...]:
        """The pieces' places and bytes."""
        return self.grid, tuple((tile.start, tile.spec.shape, tile.spec.key[2:]) for tile in self.tiles)

    @property
    def _cut(self) -> int:
        """The last dimension along which the tensor is cut: those before it are rows, it and those behind columns."""
        return max(
            (axis for tile in self.tiles for axis, length in enumerate(tile.spec.shape) if length != self.grid[axis]),
            default=0,
        )

    def _fill_piece(self, reader: Reader, start: int, out: memoryview, columns: int, cut: int, size: int) -> None:
        """Fill ``out`` with elements from ``start`` on: a partial first row, whole rows, a partial last row."""
        done, total = 0, len(out) // size
        while done < total:
            row, column = divmod(start + done, columns)
            width = min(columns - column, total - done)
            rows = (total - done) // columns if width == columns else 1
            part = out[done * size : (done + rows * width) * size]
            for tile in self.tiles:
                self._copy(reader, tile, (row, rows), (column, width), part, cut, size)
            done += rows * width

    def _copy(
        self,
        reader: Reader,
        tile: Tile,
        rows: tuple[int, int],
        columns: tuple[int, int],
        out: memoryview,
        cut: int,
        size: int,
    ) -> None:
        """Copy what a piece has of some rows and columns, each given by the first one and their number."""
        inner = math.prod(self.grid[cut + 1 :])
        begin, tile_width = tile.start[cut] * inner, tile.spec.shape[cut] * inner
        left, right = max(columns[0], begin), min(columns[0] + columns[1], begin + tile_width)
        if left >= right:
            return
        width = right - left
        for row, own_row, count in row_runs(self.grid[:cut], tile.start[:cut], tile.spec.shape[:cut], *rows):
            at = (row - rows[0]) * columns[1] + left - columns[0]
            first = own_row * tile_width + left - begin
            if width == columns[1] or count == 1:  # the rows follow one another in ``out`` too, and all are whole
                tile.spec.fill(reader, first, out[at * size : (at + count * width) * size])
                continue
            buffer = bytearray(count * width * size)
            tile.spec.fill(reader, first, memoryview(buffer))
            places = np.frombuffer(out, np.uint8).reshape(-1, columns[1] * size)
            top, offset = row - rows[0], (left - columns[0]) * size
            places[top : top + count, offset : offset + width * size] = np.frombuffer(buffer, np.uint8).reshape(
                count, -1
            )


def row_runs(grid: Shape, start: Shape, shape: Shape, first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield runs of rows that a block has of the rows ``first …``: the row, the row within the block, and how many.

    Rows are the elements of ``grid``, the dimensions before the columns; the block is at ``start``.
    """
    # Behind the last dimension along which the block is cut, it has all rows: they are one run.
    cut = max((axis for axis, length in enumerate(shape) if length != grid[axis]), default=0)
    inner = math.prod(grid[cut + 1 :])
    length = shape[cut] * inner if shape else 1
    outer = math.prod(shape[:cut])

    def begin(number: int) -> int:
        """Return the first row of a run."""
        index = 0
        rest, places = number, []
        for size in reversed(shape[:cut]):
            rest, place = divmod(rest, size)
            places.append(place)
        for place, offset, size in zip(reversed(places), start[:cut], grid[:cut], strict=True):
            index = index * size + offset + place
        return (index * grid[cut] + start[cut]) * inner if shape else 0

    number = max(0, bisect_right(range(outer), first, key=begin) - 1)
    while number < outer and (row := begin(number)) < first + count:
        low, high = max(row, first), min(row + length, first + count)
        if low < high:
            yield low, number * length + low - row, high - low
        number += 1


def wrong_tiling(grid: Shape, tiles: Sequence[tuple[Shape, Shape]]) -> str | None:
    """Return what is wrong with blocks, each given by start and shape, that should tile a tensor; None if nothing is.

    All have to lie within it, no two may overlap, and their elements have to be as many as its own.
    """
    for start, shape in tiles:
        outside = len(start) != len(grid) or len(shape) != len(grid)
        if outside or any(
            low < 0 or low + length > whole for low, length, whole in zip(start, shape, grid, strict=True)
        ):
            return f"a piece of shape {list(shape)} at {list(start)} leaves it"
    elements = sum(math.prod(shape) for _, shape in tiles)
    if elements != math.prod(grid):
        return f"its pieces have {elements:,} elements, it has {math.prod(grid):,}"
    if not grid:
        return None
    tiles = [tile for tile in tiles if 0 not in tile[1]]
    # Go along the dimension with the most cuts; only blocks that reach beyond the next one's start can overlap it.
    axis = max(range(len(grid)), key=lambda axis: len({start[axis] for start, _ in tiles}))
    open_tiles: list[tuple[Shape, Shape]] = []
    for start, shape in sorted(tiles, key=lambda tile: tile[0][axis]):
        open_tiles = [each for each in open_tiles if each[0][axis] + each[1][axis] > start[axis]]
        for other, length in open_tiles:
            overlap = all(
                low < high + reach and high < low + own
                for low, own, high, reach in zip(start, shape, other, length, strict=True)
            )
            if overlap:
                return f"its pieces at {list(other)} and {list(start)} overlap"
        open_tiles.append((start, shape))
    return None
