"""A LoRA added to its base, for any run of elements: ``+ scale · left · right`` (Hu et al., arXiv 2106.09685).

A matrix product sums in an order that depends on the shapes it is given, on the library and on the machine; the bytes
must not. So the factors are first rounded to fixed point, with so few digits that every product and every sum of them
is exact in float64: then no order and no cut shows. 24 binary digits are left to each factor at rank 32, 21 at rank
1024, counted from the largest value of a row of ``left`` and from the largest of all columns of a strip of ``right``:
about what float32 factors hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.pieces import by_rows
from mergekit_lite.checkpoint.encodings.sum import Expected, VectorTerm
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch
from mergekit_lite.errors import CheckpointError

MAX_RANK = 4096  # beyond it the fixed point of the factors would have fewer digits than float32 needs
FACTOR = 1 << 19  # elements of a factor in one piece, so that no rank makes it large; the reader remembers 16 pieces
DIGITS = 53  # binary digits of a float64
LEAST_EXPONENT, MOST_EXPONENT = -1000, 1000


@dataclass(frozen=True, slots=True)
class LowRank(VectorTerm):
    """``left · right``, in the base's orientation."""

    left: TensorSpec  # (rows, rank); may be a transposed view of what is stored
    right: TensorSpec  # (rank, columns); likewise

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the product of the factors."""
        # Cut by strips of columns, whose width depends on the rank alone, as the fixed point of ``right`` is a strip's.
        rank, columns = self.right.shape
        height = width = max(1, FACTOR // rank)
        digits = _digits(rank) // 2
        for row, column, part in by_rows(start, total, columns):
            for top in range(0, len(part), height):
                rows = part[top : top + height]
                left = self.left.elements(reader, (row + top) * rank, len(rows) * rank)
                scaled = left.view(-1, rank).double().mul_(self.scale)
                # Each strip that these columns touch; of the first and the last one it may be some columns only.
                for begin in range(column // width * width, column + part.shape[1], width):
                    powers, right = _strip(reader, self.right, begin, min(width, columns - begin))
                    first, last = max(begin, column), min(begin + width, column + part.shape[1])
                    fixed = _fixed_point(scaled * powers, digits)
                    rows[:, first - column : last - column] += fixed @ right[:, first - begin : last - begin]

    def expected(self, name: str, shape: tuple[int, ...]) -> Expected:
        """Return the shapes of two factors of one rank, which is that of ``left``."""
        rank = min(self.left.shape[-1], MAX_RANK) if self.left.shape else 0
        if len(shape) != 2 or rank == 0:
            raise CheckpointError(f"{name}: factors of a tensor of shape {list(shape)}, expected a matrix, rank ≥ 1")
        rows, columns = shape
        return {self.left: ((rows, rank), dtypes.FLOATS), self.right: ((rank, columns), dtypes.FLOATS)}


def _strip(reader: Reader, right: TensorSpec, begin: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return powers of two, (rank,), and columns of the right factor in fixed point, (rank, width); both float64.

    The rows of a factor may differ much in size, and all of them are summed. So each is divided by a power of two of
    its own, which is exact; the same column of ``left`` is multiplied by it before that is rounded.
    """

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        rank, columns = right.shape
        stored = torch.empty(rank, width, dtype=dtypes.torch_dtype(right.dtype))
        if width == columns:
            right.read(reader, 0, stored.view(-1))
        else:
            for number, row in enumerate(stored):
                right.read(reader, number * columns + begin, row)
        values = stored.double()
        powers = _power_of_two(values)
        digits = _digits(rank)
        return powers.view(-1), _fixed_point(values.div_(powers), digits - digits // 2)

    return reader.remembered((right, begin), read)


def _digits(rank: int) -> int:
    """Return how many binary digits both factors may have together for sums of ``rank`` products to be exact.

    A product of factors of a and b digits has a + b; a sum of ``rank`` of them has ⌈log₂ rank⌉ more; a float64 has 53.
    """
    return DIGITS - (rank - 1).bit_length()


def _fixed_point(values: torch.Tensor, digits: int) -> torch.Tensor:
    """Return each row rounded to this many binary digits, counted from those of its largest value."""
    units = _power_of_two(values, less=digits)
    return (values / units).round_().mul_(units)


def _power_of_two(values: torch.Tensor, less: int = 0) -> torch.Tensor:
    """Return for each row a power of two above all its values, divided by 2 to the ``less``-th; (rows, 1)."""
    exponent = torch.frexp(values.abs().amax(1, keepdim=True)).exponent.long() - less
    # Put together from its bits, the biased exponent above 52 bits of fraction: a library's pow need not be exact.
    return (exponent.clamp_(LEAST_EXPONENT, MOST_EXPONENT) + 1023 << 52).view(torch.float64)
