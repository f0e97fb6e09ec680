"""Matrices of packed integer codes in which each group of a row has a scale and a bias: ``scale · code + bias``.

MLX stores them so (``mlx.core.quantize``): a row of codes is a little-endian stream of bits, in whole words of 32. The
product and the sum are each rounded to the dtype of the scales, as ``mlx.core.dequantize`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.bits import unpacked
from mergekit_lite.checkpoint.encodings.pieces import by_rows, pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class Affine(Encoding):
    """Codes of ``bits`` bits; the values have the dtype of the scales."""

    codes: TensorSpec  # (…, rows, columns · bits / 32), uint32
    scale: TensorSpec  # (…, rows, columns / group)
    bias: TensorSpec  # like the scale
    bits: int
    group: int  # elements of a row that share a scale and a bias
    scheme: str | None = None

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Unpack the codes, and apply scales and biases."""
        for begin, piece in pieces(start, out, spec.dtype):
            for row, column, part in by_rows(begin, piece, spec.shape[-1]):
                self._fill_rows(spec.shape[-1], reader, row, column, part)

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype of the words that hold the codes."""
        return self.codes.dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes of the codes."""
        return -(-count * self.bits // 8)

    @property
    def block(self) -> Block:
        """The group, as a block of one row."""
        return 1, self.group

    @property
    def key(self) -> tuple[object, ...]:
        """The codes, the scales, the biases, and how they are cut."""
        return self.codes.key, self.scale.key, self.bias.key, self.bits, self.group

    def _fill_rows(self, columns: int, reader: Reader, row: int, column: int, out: torch.Tensor) -> None:
        """Fill ``out`` (rows, columns), which begins at ``row`` and ``column`` of the tensor."""
        rows, width = out.shape
        first, last = column // self.group, -(-(column + width) // self.group)
        begin, end = first * self.group, last * self.group  # whole groups; of several rows they are whole rows
        codes = self._codes(reader, row * columns + begin, rows * (end - begin)).view(rows, -1, self.group)
        groups = columns // self.group
        scale, bias = (
            part.elements(reader, row * groups + first, rows * (last - first)).view(rows, -1, 1)
            for part in (self.scale, self.bias)
        )
        values = codes.to(out.dtype).mul_(scale).add_(bias).view(rows, -1)
        out.copy_(values[:, column - begin : column - begin + width])

    def _codes(self, reader: Reader, start: int, count: int) -> torch.Tensor:
        """Return ``count`` codes from ``start`` on, both multiples of the eight that fill ``bits`` bytes."""
        stored = torch.empty(count * self.bits // 8, dtype=torch.uint8)
        reader.fill(self.codes.file, self.codes.offset + start * self.bits // 8, stored.numpy().data, self.codes.name)
        return unpacked(stored, self.bits)
