"""Quantised matrices whose blocks have a scale each: value = ``(code − zero point) · scale``.

The scale is multiplied, also where it is named ``weight_scale_inv``: see ``weight_dequant`` in
https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.pieces import by_rows, pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class BlockScaled(Encoding):
    """Codes, and one scale for each block of a matrix, in the wider dtype of the values and the scales."""

    codes: TensorSpec  # of the same shape
    scale: TensorSpec  # may lie in another file; a single one is for the whole tensor, also for a stack of matrices
    block: Block  # (128, 128) is DeepSeek's block FP8, (1, columns) one scale a row, (rows, columns) one a matrix
    zero_point: TensorSpec | None = None  # the code of zero, like the scale
    scheme: str | None = None

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read the codes, subtract their zero points and multiply them by their scales."""
        working = dtypes.torch_dtype(dtypes.promoted((spec.dtype, self.scale.dtype)))
        for begin, piece in pieces(start, out, spec.dtype):
            values = piece if piece.dtype == working else torch.empty_like(piece, dtype=working)
            values.copy_(self.codes.elements(reader, begin, piece.numel()))
            for row, column, part in by_rows(begin, values, spec.shape[-1] if spec.shape else 1):
                if self.zero_point is not None:
                    self._apply(torch.Tensor.sub_, self.zero_point, reader, row, column, part)
                self._apply(torch.Tensor.mul_, self.scale, reader, row, column, part)
            if values is not piece:
                piece.copy_(values)

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype of the codes."""
        return self.codes.stored_dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes of the codes."""
        return self.codes.stored_bytes(count)

    @property
    def key(self) -> tuple[object, ...]:
        """The codes, the scales, the block, and the zero points."""
        zero_point = () if self.zero_point is None else (self.zero_point.key,)
        return self.codes.key, self.scale.key, self.block, *zero_point

    def _apply(
        self,
        operation: Callable[[torch.Tensor, torch.Tensor], object],
        by_block: TensorSpec,
        reader: Reader,
        row: int,
        column: int,
        values: torch.Tensor,
    ) -> None:
        """Subtract or multiply by a number of each block, in place.

        ``values`` (rows, columns) begin at ``row`` and ``column`` of the tensor. Rows are counted through a stack of
        matrices as if it were one tall matrix.
        """
        if by_block.numel == 1:
            operation(values, by_block.elements(reader, 0, 1).to(values.dtype).reshape(()))
            return
        matrix = self.codes.shape[-2], self.codes.shape[-1]
        height, width = self.block
        grid_rows, grid_columns = grid(matrix, self.block)
        # The row of blocks for each row: as many as the matrices before it have, and the one it is in.
        rows = torch.arange(row, row + len(values))
        block_rows = rows // matrix[0] * grid_rows + rows % matrix[0] // height
        begin, end = int(block_rows[0]), int(block_rows[-1]) + 1
        stored = by_block.elements(reader, begin * grid_columns, (end - begin) * grid_columns)
        numbers = stored.to(values.dtype).view(-1, grid_columns)[block_rows - begin]
        if values.shape[1] == matrix[1]:
            whole = matrix[1] // width
            operation(values[:, : whole * width].view(-1, whole, width), numbers[:, :whole, None])
            operation(values[:, whole * width :], numbers[:, whole:])  # the ragged last block
        else:
            operation(values, numbers[:, torch.arange(column, column + values.shape[1]) // width])


def grid(matrix: Block, block: Block) -> Block:
    """Return how many rows and columns of blocks cover a matrix, ragged blocks at the edges included."""
    return -(-matrix[0] // block[0]), -(-matrix[1] // block[1])
