"""A LoRA added to its base, for any run of elements: ``+ scale · left · right`` (Hu et al., arXiv 2106.09685).

A matrix product sums in an order that depends on the shapes it is given, on the library and on the machine; the bytes
must not. So the factors are first rounded to fixed point, with so few digits that every product and every sum of them
is exact in float64: then no order and no cut shows. 24 binary digits are left to each factor at rank 32, 21 at rank
1024, counted from the largest value of a row of ``left`` and from the largest of all columns of a strip of ``right``:
about what float32 factors hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.change import LowRank
from mergekit_lite.checkpoint.pieces import by_rows
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.reader import Reader

FACTOR = 1 << 19  # elements of a factor in one piece, so that no rank makes it large; the reader remembers 16 pieces
DIGITS = 53  # binary digits of a float64
LEAST_EXPONENT, MOST_EXPONENT = -1000, 1000


def add_product(reader: Reader, low_rank: LowRank, start: int, total: torch.Tensor) -> None:
    """Add a product of factors, times its scale, to ``total`` (1-D, float64), the elements ``start …`` of a matrix.

    Raises:
        RunError: a file can't be read.
    """
    for row, column, part in by_rows(start, total, low_rank.right.shape[-1]):
        _add(reader, low_rank, row, column, part)


def _add(reader: Reader, low_rank: LowRank, row: int, column: int, part: torch.Tensor) -> None:
    """Add the product to ``part`` (rows, columns; float64), which lies at ``row`` and ``column`` of the tensor.

    Cut by strips of columns, whose width depends on the rank alone: the fixed point of ``right`` is that of a strip.
    """
    rank, columns = low_rank.right.shape
    height = width = max(1, FACTOR // rank)
    for top in range(0, len(part), height):
        rows = part[top : top + height]
        left = torch.empty(len(rows) * rank, dtype=dtypes.torch_dtype(low_rank.left.dtype))
        reader.read(low_rank.left, (row + top) * rank, left)
        scaled = left.view(-1, rank).double().mul_(low_rank.scale)
        for begin in range(column // width * width, column + part.shape[1], width):
            sizes, right = _strip(reader, low_rank.right, begin, min(width, columns - begin))
            first, last = max(begin, column), min(begin + width, column + part.shape[1])
            fixed = _fixed_point(scaled * sizes, _digits(rank) // 2)
            rows[:, first - column : last - column] += fixed @ right[:, first - begin : last - begin]


def _strip(reader: Reader, right: TensorSpec, begin: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some columns of the right factor: a power of two for each row, and the rows divided by it, in fixed point."""

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        rank, columns = right.shape
        stored = torch.empty(rank, width, dtype=dtypes.torch_dtype(right.dtype))
        if width == columns:
            reader.read(right, 0, stored.view(-1))
        else:
            for number, row in enumerate(stored):
                reader.read(right, number * columns + begin, row)
        values = stored.double()
        sizes = _power_of_two(values)
        digits = _digits(rank)
        return sizes.view(-1), _fixed_point(values.div_(sizes), digits - digits // 2)

    return reader.remembered((right.file, right.offset, right.strides, begin), read)


def _digits(rank: int) -> int:
    """The binary digits that both factors may have together, so that sums of ``rank`` products are exact."""
    return DIGITS - (rank - 1).bit_length()


def _fixed_point(values: torch.Tensor, digits: int) -> torch.Tensor:
    """Each row rounded to so many binary digits of its largest value."""
    units = _power_of_two(values, less=digits)
    return (values / units).round_().mul_(units)


def _power_of_two(values: torch.Tensor, less: int = 0) -> torch.Tensor:
    """For each row a power of two above all its values, divided by 2 to the ``less``-th; (rows, 1)."""
    exponent = torch.frexp(values.abs().amax(1, keepdim=True)).exponent.long() - less
    # Put together from its bits: a library's pow need not be exact.
    return (exponent.clamp_(LEAST_EXPONENT, MOST_EXPONENT) + 1023 << 52).view(torch.float64)
