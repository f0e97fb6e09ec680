"""The best approximation of a difference by a product of two thin matrices.

Where the rank is well below the sides of the matrix, by random projection with two power iterations (Halko, Martinsson
& Tropp 2011, arXiv 0909.4061, algorithm 4.4): the matrix is only ever multiplied, row block by row block, and never has
to be in memory as a whole. What it throws away is within a few thousandths of the best for the spectra of fine-tuning.
Else by a singular value decomposition, with the matrix whole and in float64. The random matrix is drawn from the seed
and the tensor's name, so the bytes are the same every time on one device and build of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from mergekit_lite import draws
from mergekit_lite.vectors.differences import BLOCK, Difference, read
from mergekit_lite.vectors.encoders import Part, Put, Sketch

OVERSAMPLING, ITERATIONS = 10, 2
KEPT = 1 << 25  # elements; smaller matrices stay in memory, as float32
FIRST_RANK = 16
STREAM = 7  # of a tensor's draws

Blocks = Callable[[], Iterator[tuple[int, torch.Tensor]]]  # the first row of each block, and its rows: float32


class Factors(NamedTuple):
    """``left · right``, (m, r) and (r, n), float32; the singular values (float64), and ‖matrix‖²."""

    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor
    square: float

    @property
    def lost(self) -> float:
        """‖matrix − left · right‖²: the projection and what it leaves are at right angles."""
        return max(0.0, self.square - self.values.square().sum().item())


@dataclass(frozen=True)
class LowRank:
    """Factors of a fixed ``rank``, or of the least that keeps a share ``energy`` of ‖difference‖².

    Attributes:
        device: where the products are computed.
        spill: a folder for factors whose rank had to be found out first.
        turned: write the factors of the transpose, for layers that store their weight as (in, out).
    """

    rank: int | None
    energy: float | None
    seed: int
    device: str
    spill: Path
    turned: bool = False

    def measure(self, difference: Difference) -> Sketch:
        """Find the rank."""
        rows, columns = reversed(difference.pair.tuned.shape) if self.turned else difference.pair.tuned.shape
        if self.rank is not None:
            rank, file = min(self.rank, rows, columns), None
        else:
            found = self._factors(difference)
            rank, file = found.left.shape[1], self.spill / f"{draws.stream_key(0, difference.pair.name):x}.pt"
            torch.save(tuple(found), file)
        parts = Part("left", "float32", (rows, rank)), Part("right", "float32", (rank, columns))
        return Sketch(parts, file)

    def write(self, difference: Difference, sketch: Sketch, put: Put) -> float:
        """Write the factors."""
        found = self._factors(difference) if sketch.memory is None else Factors(*torch.load(sketch.memory))
        put("left", 0, found.left.flatten())
        put("right", 0, found.right.flatten())
        return found.lost

    def _factors(self, difference: Difference) -> Factors:
        pair = difference.pair
        blocks = _in_memory_if_small(lambda: row_blocks(difference, self.device), pair.tuned.numel)
        square = math.fsum(block.double().square().sum().item() for _, block in blocks())
        key = draws.stream_key(self.seed, pair.name, STREAM)
        shape = pair.tuned.shape[0], pair.tuned.shape[1]
        rank = min(self.rank or FIRST_RANK, *shape)
        while True:
            left, values, right = leading(blocks, shape, rank, key, self.device)
            if self.energy is None:
                break
            reached = values.square().cumsum(0) >= self.energy * square
            if bool(reached.any()) or rank == min(shape):
                rank = int(reached.nonzero()[0]) + 1 if bool(reached.any()) else rank
                break
            rank = min(2 * rank, *shape)
        values = values[:rank]
        sides = values.sqrt()
        left, right = left[:, :rank] * sides, sides[:, None] * right[:rank]
        if self.turned:
            left, right = right.T, left.T
        return Factors(left.float().contiguous(), right.float().contiguous(), values, square)


def leading(
    blocks: Blocks, shape: tuple[int, int], rank: int, key: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular vectors and values of a matrix: (m, r), (r,), (r, n), float64 on the CPU."""
    width = rank + OVERSAMPLING
    if 2 * width >= min(shape):
        left, values, right = torch.linalg.svd(torch.cat([b for _, b in blocks()]).double(), full_matrices=False)
        return left[:, :rank].cpu(), values[:rank].cpu(), right[:rank].cpu()
    right = draws.uniform(key, 0, shape[1] * width).view(shape[1], width).sub_(0.5).to(device)
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(_times(blocks, right, shape)).Q
        right = torch.linalg.qr(_times_transposed(blocks, left, shape)).Q
    left = torch.linalg.qr(_times(blocks, right, shape)).Q
    small = _times_transposed(blocks, left, shape).double()
    across, values, inner = torch.linalg.svd(small, full_matrices=False)  # small = across · values · inner
    outer = left.double() @ inner.T
    return outer[:, :rank].cpu(), values[:rank].cpu(), across[:, :rank].T.cpu()


def _times(blocks: Blocks, right: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """matrix · right."""
    made = torch.empty(shape[0], right.shape[1], device=right.device)
    for row, block in blocks():
        made[row : row + len(block)] = block @ right
    return made


def _times_transposed(blocks: Blocks, left: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """matrixᵀ · left."""
    made = torch.zeros(shape[1], left.shape[1], device=left.device)
    for row, block in blocks():
        made += block.T @ left[row : row + len(block)]
    return made


def row_blocks(difference: Difference, device: str) -> Iterator[tuple[int, torch.Tensor]]:
    """The difference in blocks of whole rows: the first row, and the rows as float32."""
    pair = difference.pair
    assert pair.base is not None
    rows, columns = pair.tuned.shape
    height = max(1, BLOCK // max(1, columns))
    for row in range(0, rows, height):
        start, count = row * columns, min(height, rows - row) * columns
        tuned = read(difference.reader, pair.tuned, start, count).to(device).double()
        base = read(difference.reader, pair.base, start, count).to(device).double()
        yield row, tuned.sub_(base).float().view(-1, columns)


def _in_memory_if_small(blocks: Blocks, numel: int) -> Blocks:
    if numel > KEPT:
        return blocks
    kept = list(blocks())
    return lambda: iter(kept)
