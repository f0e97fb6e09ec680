"""Whole numbers of a few bits in 32-bit words, as compressed-tensors packs them.

Each is stored with half its range added. Numbers are packed along an axis, from the lowest bit on, and the last word of
a row, or column, is filled up.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.bits import TOGETHER, unpacked
from mergekit_lite.checkpoint.encodings.pieces import by_rows, pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Encoding, TensorSpec
from mergekit_lite.deferred import torch

WORD = 32  # bits, and the numbers that fill whole words, whatever their bits


@dataclass(frozen=True, slots=True)
class _Packed(Encoding):
    """Numbers in words, along whichever axis."""

    words: TensorSpec  # int32
    bits: int

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype of the words."""
        return self.words.dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes of the packed numbers."""
        return -(-count * self.bits // 8)

    @property
    def key(self) -> tuple[object, ...]:
        """The words and the bits of a number."""
        return self.words.key, self.bits


@dataclass(frozen=True, slots=True)
class PackedRows(_Packed):
    """A matrix, int8, of which each row is packed: (rows, ⌈columns · bits / 32⌉) words."""

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Unpack the numbers."""
        columns = spec.shape[-1]
        for begin, piece in pieces(start, out, spec.dtype):
            for row, column, part in by_rows(begin, piece, columns):
                # Of one row, whole bytes around what is wanted; of several, whole rows.
                first = column // TOGETHER * TOGETHER
                last = first - (first - column - part.shape[1]) // TOGETHER * TOGETHER
                part.copy_(self._numbers(reader, row, len(part), first, last)[:, column - first :][:, : part.shape[1]])

    def _numbers(self, reader: Reader, row: int, rows: int, first: int, last: int) -> torch.Tensor:
        """Return (rows, numbers) from ``row`` and ``first`` on, a multiple of eight; of several rows all, and more."""
        stride = self.words.shape[-1] * WORD // 8
        begin, end = (first * self.bits // 8, last * self.bits // 8) if rows == 1 else (0, stride)
        stored = torch.zeros(rows, -(-(end - begin) // self.bits) * self.bits, dtype=torch.uint8)
        if rows == 1:
            wanted = stored.view(-1)[: min(end, stride) - begin]
        else:
            wanted = torch.empty(rows * stride, dtype=torch.uint8)
        reader.fill(self.words.file, self.words.offset + row * stride + begin, wanted.numpy().data, self.words.name)
        if rows > 1:
            stored[:, :stride] = wanted.view(rows, stride)
        return centred(unpacked(stored, self.bits), self.bits)


@dataclass(frozen=True, slots=True)
class PackedColumns(_Packed):
    """A matrix, int8, of which each column is packed: (⌈rows · bits / 32⌉, columns) words."""

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Unpack the rows that the elements are in."""
        columns = spec.shape[-1]
        for begin, piece in pieces(start, out, spec.dtype):
            first, last = begin // columns, -(-(begin + piece.numel()) // columns)
            whole = first // WORD * WORD  # from here on words begin with a number
            top, bottom = whole * self.bits // WORD, -(-last * self.bits // WORD)
            words = self.words.elements(reader, top * columns, (bottom - top) * columns)
            by_column = words.view(-1, columns).T.clone(memory_format=torch.contiguous_format).view(torch.uint8)
            padding = -by_column.shape[1] % self.bits
            numbers = centred(unpacked(torch.nn.functional.pad(by_column, (0, padding)), self.bits), self.bits)
            rows = numbers.T[first - whole : last - whole].reshape(-1)
            piece.copy_(rows[begin - first * columns :][: piece.numel()])


def centred(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return numbers around zero, int8, of codes from 0 on, uint8."""
    return codes.view(torch.int8) - (1 << (bits - 1)) if bits < 8 else (codes ^ 128).view(torch.int8)
