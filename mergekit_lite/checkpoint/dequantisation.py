"""From stored codes to values, for any run of elements: ``float32(code) * scale``.

The scale is multiplied, also where it is named ``weight_scale_inv``: see ``weight_dequant`` in
https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.pieces import by_rows, pieces
from mergekit_lite.checkpoint.tensor import TensorSpec, grid
from mergekit_lite.deferred import torch

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.reader import Reader


def dequantise(reader: Reader, spec: TensorSpec, start: int, out: torch.Tensor) -> None:
    """Fill ``out`` (float32) with the elements ``start …`` of a quantised tensor: ``float32(code) * scale``.

    Raises:
        RunError: a file can't be read.
    """
    assert spec.scale is not None
    stored = replace(spec, dtype=spec.scale.codes, scale=None)
    for begin, piece in pieces(start, out):
        codes = torch.empty(piece.numel(), dtype=dtypes.torch_dtype(spec.scale.codes))
        reader.read(stored, begin, codes)
        piece.copy_(codes)
        if spec.scale.spec.numel == 1:
            piece.mul_(_scale_rows(reader, spec.scale.spec, 0, 1, columns=1).reshape(()))
            continue
        for row, column, part in by_rows(begin, piece, spec.shape[-1]):
            _multiply(reader, spec, row, column, part)


def _multiply(reader: Reader, spec: TensorSpec, row: int, column: int, values: torch.Tensor) -> None:
    """Multiply ``values`` (rows, columns), which lie at ``row`` and ``column`` of the tensor, in place by their scales.

    Rows are counted through a stack of matrices as if it were one tall matrix.
    """
    assert spec.scale is not None
    matrix = spec.shape[-2], spec.shape[-1]
    height, width = spec.scale.block
    grid_rows, grid_columns = grid(matrix, spec.scale.block)
    rows = torch.arange(row, row + len(values))
    scale_rows = rows // matrix[0] * grid_rows + rows % matrix[0] // height
    begin, end = int(scale_rows[0]), int(scale_rows[-1]) + 1
    scales = _scale_rows(reader, spec.scale.spec, begin, end, grid_columns)[scale_rows - begin]
    if values.shape[1] == matrix[1]:
        whole = matrix[1] // width
        values[:, : whole * width].view(-1, whole, width).mul_(scales[:, :whole, None])
        values[:, whole * width :].mul_(scales[:, whole:])  # the ragged last block
    else:
        values.mul_(scales[:, torch.arange(column, column + values.shape[1]) // width])


def _scale_rows(reader: Reader, scale: TensorSpec, begin: int, end: int, columns: int) -> torch.Tensor:
    """The rows ``begin … end`` of a scale tensor of so many columns, as float32."""
    stored = torch.empty((end - begin) * columns, dtype=dtypes.torch_dtype(scale.dtype))
    reader.read(scale, begin * columns, stored)
    return stored.to(torch.float32).view(-1, columns)
