"""Quantised matrices whose blocks have a scale each: value = ``float32(code) * scale``.

The scale is multiplied, also where it is named ``weight_scale_inv``: see ``weight_dequant`` in
https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.pieces import by_rows, pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class BlockScaled(Encoding):
    """Codes, and one scale for each block of a matrix; the values are float32."""

    codes: TensorSpec  # of the same shape
    scale: TensorSpec  # may lie in another file; a single one is for the whole tensor, also for a stack of matrices
    block: Block  # (128, 128) is DeepSeek's block FP8, (1, columns) one scale a row, (rows, columns) one a matrix

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read the codes and multiply them by their scales."""
        for begin, piece in pieces(start, out, spec.dtype):
            piece.copy_(self.codes.elements(reader, begin, piece.numel()))
            if self.scale.numel == 1:
                piece.mul_(self._scale_rows(reader, 0, 1, columns=1).reshape(()))
                continue
            for row, column, part in by_rows(begin, piece, spec.shape[-1]):
                self._multiply(reader, row, column, part)

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype of the codes."""
        return self.codes.dtype

    @property
    def key(self) -> tuple[object, ...]:
        """The codes, the scales and the block."""
        return self.codes.key, self.scale.key, self.block

    def _multiply(self, reader: Reader, row: int, column: int, values: torch.Tensor) -> None:
        """Multiply ``values`` (rows, columns), which begin at ``row`` and ``column`` of the tensor, by their scales.

        Rows are counted through a stack of matrices as if it were one tall matrix.
        """
        matrix = self.codes.shape[-2], self.codes.shape[-1]
        height, width = self.block
        grid_rows, grid_columns = grid(matrix, self.block)
        # The row of scales for each row: as many as the matrices before it have, and the block it is in.
        rows = torch.arange(row, row + len(values))
        scale_rows = rows // matrix[0] * grid_rows + rows % matrix[0] // height
        begin, end = int(scale_rows[0]), int(scale_rows[-1]) + 1
        scales = self._scale_rows(reader, begin, end, grid_columns)[scale_rows - begin]
        if values.shape[1] == matrix[1]:
            whole = matrix[1] // width
            values[:, : whole * width].view(-1, whole, width).mul_(scales[:, :whole, None])
            values[:, whole * width :].mul_(scales[:, whole:])  # the ragged last block
        else:
            values.mul_(scales[:, torch.arange(column, column + values.shape[1]) // width])

    def _scale_rows(self, reader: Reader, begin: int, end: int, columns: int) -> torch.Tensor:
        stored = self.scale.elements(reader, begin * columns, (end - begin) * columns)
        return stored.to(torch.float32).view(-1, columns)


def grid(matrix: Block, block: Block) -> Block:
    """Return how many rows and columns of blocks cover a matrix, ragged blocks at the edges included."""
    return -(-matrix[0] // block[0]), -(-matrix[1] // block[1])
