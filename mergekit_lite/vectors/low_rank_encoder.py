"""Low-rank encoder: approximates a difference by a product of two thin matrices.

Where the rank is well below the sides of the matrix, the factors come from random projection with two power iterations
(Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.4). It only multiplies the matrix, block by block of rows,
so the matrix need not be in memory as a whole. For the spectra of fine-tuning it throws away a few thousandths more
than the best factors. Elsewhere they come from a singular value decomposition of the whole matrix in float64. The
random matrix is drawn from the seed and the tensor's name, so the bytes are the same every time on one device and build
of torch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from mergekit_lite import draws
from mergekit_lite.vectors.differences import READ_ELEMENTS, TensorDifference
from mergekit_lite.vectors.encoders import StoragePlan, StoredPart, WritePart

OVERSAMPLING, ITERATIONS = 10, 2
IN_MEMORY_ELEMENTS = 1 << 25  # elements; smaller matrices stay in memory, as float32
FIRST_RANK = 16  # tried for ``energy``, then doubled
STREAM = 7  # number of the stream of random draws

RowBlocks = Callable[[], Iterator[tuple[int, torch.Tensor]]]  # number of the first row of each block, and the rows


class LowRankFactors(NamedTuple):
    """``left`` (m, r) and ``right`` (r, n), float32; the singular values (r,), float64; and ‖matrix‖²."""

    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor
    square: float

    @property
    def lost(self) -> float:
        """‖matrix − left · right‖² = ‖matrix‖² − ‖left · right‖², as projection and rest are at right angles."""
        return max(0.0, self.square - self.values.square().sum().item())


@dataclass(frozen=True)
class LowRankEncoder:
    """Stores two factors of a fixed ``rank``, or of the least that keeps a share ``energy`` of ‖difference‖².

    Attributes:
        rank, energy: one of them is set.
        seed: of the random projection.
        device: where the products are computed.
        spill: folder for factors that had to be computed to find their rank.
        turned: store the factors of the transpose, for layers that store their weight as (in, out).
    """

    name: ClassVar[str] = "lowrank"

    rank: int | None
    energy: float | None
    seed: int
    device: str
    spill: Path
    turned: bool = False

    def plan(self, difference: TensorDifference) -> StoragePlan:
        """Find the rank; with ``energy`` that computes the factors, which wait on the disk."""
        rows, columns = reversed(difference.pair.tuned.shape) if self.turned else difference.pair.tuned.shape
        if self.rank is not None:
            rank, file = min(self.rank, rows, columns), None
        else:
            factors = self._factors(difference)
            rank, file = factors.left.shape[1], self.spill / f"{draws.stream_key(0, difference.pair.name):x}.pt"
            content = io.BytesIO()  # given a file, torch reports a full disk in words of its own
            torch.save(tuple(factors), content)
            file.write_bytes(content.getbuffer())
        parts = StoredPart("left", "float32", (rows, rank)), StoredPart("right", "float32", (rank, columns))
        return StoragePlan(parts, file)

    def write(self, difference: TensorDifference, storage: StoragePlan, write_part: WritePart) -> float:
        """Write the factors."""
        factors = self._factors(difference) if storage.state is None else LowRankFactors(*torch.load(storage.state))
        write_part("left", 0, factors.left.flatten())
        write_part("right", 0, factors.right.flatten())
        return factors.lost

    def _factors(self, difference: TensorDifference) -> LowRankFactors:
        """Compute the factors, with a larger rank until ``energy`` is reached."""
        pair = difference.pair
        blocks = _in_memory_if_small(lambda: row_blocks(difference, self.device), pair.tuned.numel)
        square = math.fsum(block.double().square().sum().item() for _, block in blocks())
        key = draws.stream_key(self.seed, pair.name, STREAM)
        shape = pair.tuned.shape[0], pair.tuned.shape[1]
        rank = min(self.rank or FIRST_RANK, *shape)
        while True:
            left, values, right = leading_singular_vectors(blocks, shape, rank, key, self.device)
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
        return LowRankFactors(left.float().contiguous(), right.float().contiguous(), values, square)


def leading_singular_vectors(
    blocks: RowBlocks, shape: tuple[int, int], rank: int, key: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading singular vectors and values of a matrix: (m, r), (r,), (r, n), float64, on the CPU."""
    width = rank + OVERSAMPLING
    if 2 * width >= min(shape):
        left, values, right = torch.linalg.svd(torch.cat([b for _, b in blocks()]).double(), full_matrices=False)
        return left[:, :rank].cpu(), values[:rank].cpu(), right[:rank].cpu()
    right = draws.uniform(key, 0, shape[1] * width).view(shape[1], width).sub_(0.5).to(device)
    for _ in range(ITERATIONS):  # each turns the columns of ``right`` towards the leading singular vectors
        left = torch.linalg.qr(_times(blocks, right, shape)).Q
        right = torch.linalg.qr(_times_transposed(blocks, left, shape)).Q
    left = torch.linalg.qr(_times(blocks, right, shape)).Q
    # ``left`` spans nearly what the leading vectors span: decompose the matrix projected on it
    small = _times_transposed(blocks, left, shape).double()
    across, values, inner = torch.linalg.svd(small, full_matrices=False)  # small = across · values · inner
    outer = left.double() @ inner.T
    return outer[:, :rank].cpu(), values[:rank].cpu(), across[:, :rank].T.cpu()


def _times(blocks: RowBlocks, right: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return matrix · right."""
    product = torch.empty(shape[0], right.shape[1], device=right.device)
    for row, block in blocks():
        product[row : row + len(block)] = block @ right
    return product


def _times_transposed(blocks: RowBlocks, left: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return matrixᵀ · left."""
    product = torch.zeros(shape[1], left.shape[1], device=left.device)
    for row, block in blocks():
        product += block.T @ left[row : row + len(block)]
    return product


def row_blocks(difference: TensorDifference, device: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the difference in blocks of whole rows: the number of the first row, and the rows (rows, n) as float32."""
    pair = difference.pair
    assert pair.base is not None
    rows, columns = pair.tuned.shape
    height = max(1, READ_ELEMENTS // max(1, columns))
    for row in range(0, rows, height):
        start, count = row * columns, min(height, rows - row) * columns
        tuned = pair.tuned.elements(difference.reader, start, count).to(device).double()
        base = pair.base.elements(difference.reader, start, count).to(device).double()
        yield row, tuned.sub_(base).float().view(-1, columns)


def _in_memory_if_small(blocks: RowBlocks, numel: int) -> RowBlocks:
    """Read the blocks of a small matrix once and keep them; read those of a larger one each time."""
    if numel > IN_MEMORY_ELEMENTS:
        return blocks
    in_memory = list(blocks())
    return lambda: iter(in_memory)
