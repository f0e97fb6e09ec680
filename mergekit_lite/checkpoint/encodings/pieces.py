"""How a run of a tensor's elements is cut where its values are computed while they are read."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lite.checkpoint.reader import tensor_of
from mergekit_lite.deferred import torch

PIECE = 1 << 20  # elements at a time: what one piece needs is all the memory that is needed


def pieces(start: int, out: memoryview, dtype: str, most: int = PIECE) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield a buffer of elements in pieces of at most ``most``, each with the index of its first element."""
    values, size = tensor_of(out, dtype), min(most, PIECE)
    for done in range(0, values.numel(), size):
        yield start + done, values[done : done + size]


def by_rows(start: int, piece: torch.Tensor, columns: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield a partial first row, whole rows and a partial last row: the row and column of each begin, and a matrix."""
    done, total = 0, piece.numel()
    while done < total:
        row, column = divmod(start + done, columns)
        width = min(columns - column, total - done)
        length = (total - done) // columns * columns if width == columns else width
        yield row, column, piece[done : done + length].view(-1, width)
        done += length
