"""Tensors in pieces, along any dimensions: every cut of every run of elements reads as the whole does."""

from __future__ import annotations

import math
import tempfile
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.checkpoint.encodings import tiled
from mergekit_lite.checkpoint.encodings.strided import Strided
from mergekit_lite.checkpoint.encodings.tiled import Tile, Tiled, wrong_tiling
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import PLAIN, TensorSpec
from mergekit_lite.checkpoint.training.state import joined
from mergekit_lite.errors import CheckpointError
from tests.checkpoint.reading import bits

Block = tuple[tuple[int, ...], tuple[int, ...]]


@st.composite
def cut(draw) -> tuple[tuple[int, ...], list[Block]]:
    """A shape, and blocks that tile it: by a grid, or by cutting one block after another anywhere."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    blocks: list[Block] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        start, size = blocks.pop(draw(st.integers(0, len(blocks) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, size[axis]))
        blocks.append((start, (*size[:axis], at, *size[axis + 1 :])))
        blocks.append(
            ((*start[:axis], start[axis] + at, *start[axis + 1 :]), (*size[:axis], size[axis] - at, *size[axis + 1 :]))
        )
    return shape, draw(st.permutations(blocks))


def stored(folder: Path, whole: torch.Tensor, blocks: list[Block], transposed: bool) -> list[Tile]:
    """The pieces of a tensor, one behind the other in one file; or each with its dimensions the other way round."""
    tiles, data = [], b"xyz"
    for start, shape in blocks:
        piece = whole[tuple(slice(low, low + length) for low, length in zip(start, shape, strict=True))].contiguous()
        encoding = PLAIN
        if transposed:
            piece = piece.permute(*reversed(range(piece.dim()))).contiguous()
            encoding = Strided(tuple(reversed(piece.stride())))
        tiles.append(Tile(start, TensorSpec("piece", "bfloat16", shape, folder / "pieces", len(data), encoding)))
        data += bits(piece)
    (folder / "pieces").write_bytes(data)
    return tiles


@settings(max_examples=60)
@given(cut(), st.booleans(), st.integers(1, 40), st.data())
def test_any_run_of_elements_reads_as_of_the_whole(case, transposed, piece, data):
    shape, blocks = case
    whole = torch.arange(math.prod(shape)).to(torch.bfloat16).view(shape)
    with tempfile.TemporaryDirectory() as name, Reader() as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "PIECE", piece)
        spec = joined("here", "w", shape, shape, stored(Path(name), whole, blocks, transposed))
        begin = data.draw(st.integers(0, spec.numel))
        count = data.draw(st.integers(0, spec.numel - begin))
        assert bits(spec.elements(reader, begin, count)) == bits(whole.flatten()[begin : begin + count])


@settings(max_examples=80)
@given(cut(), st.data())
def test_a_hole_or_an_overlap_is_found(case, data):
    shape, blocks = case
    assert wrong_tiling(shape, blocks) is None
    start, size = blocks[data.draw(st.integers(0, len(blocks) - 1))]
    others = [block for block in blocks if block != (start, size)]
    moved = tuple(data.draw(st.integers(-1, length + 1)) for length in shape)
    sizes = tuple(data.draw(st.integers(0, length + 1)) for length in shape)
    changed = [*others, (moved, sizes)]
    counts = torch.zeros(shape, dtype=torch.int64)
    inside = all(
        low >= 0 and low + length <= whole
        for block in changed
        for low, length, whole in zip(*block, shape, strict=True)
    )
    for low, length in changed if inside else ():
        counts[tuple(slice(a, a + b) for a, b in zip(low, length, strict=True))] += 1
    assert (wrong_tiling(shape, changed) is None) == (inside and bool((counts == 1).all()))


def test_pieces_of_two_dtypes_are_refused(tmp_path):
    tiles = [
        Tile((row, 0), TensorSpec("piece", dtype, (1, 2), tmp_path / "x", 0))
        for row, dtype in enumerate(("float32", "bfloat16"))
    ]
    with pytest.raises(CheckpointError, match="bfloat16 and float32"):
        joined("here", "w", (2, 2), (2, 2), tiles)


def test_many_pieces_are_checked_in_good_time():
    """Each way to cut among 1,024 processes, in both dimensions too: no comparison of all with all."""
    for grid in ((1024, 1), (1, 1024), (32, 32)):
        blocks = [((row * 3, column * 5), (3, 5)) for row, column in product(*map(range, grid))]
        assert wrong_tiling((grid[0] * 3, grid[1] * 5), blocks) is None


def test_a_piece_at_a_time_is_held(tmp_path):
    """Reading half of a tensor of 64 MB that is cut by columns takes a buffer of a piece, not of the tensor."""
    import tracemalloc

    rows, columns = 4096, 4096
    path = tmp_path / "pieces"
    with path.open("wb") as file:
        file.truncate(rows * columns * 4)
    half = columns // 2
    tiles = [
        Tile((0, side * half), TensorSpec("piece", "float32", (rows, half), path, side * rows * half * 4))
        for side in (0, 1)
    ]
    spec = joined("here", "w", (rows, columns), (rows, columns), tiles)
    assert isinstance(spec.encoding, Tiled)
    out = memoryview(bytearray(rows * columns * 2))
    tracemalloc.start()
    with Reader() as reader:
        spec.fill(reader, 0, out)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
