"""Whole numbers of −127 … 127 with one largest magnitude a row: ``code · magnitude / 127``, as LLM.int8 has them.

Both products are in float32, and the second is with bitsandbytes' rounded 1/127 (Dettmers et al., arXiv 2208.07339).
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.pieces import by_rows, pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec

ONE_127TH = 7.874015718698502e-3


@dataclass(frozen=True, slots=True)
class Vectorwise(Encoding):
    """Codes, and one magnitude for each row; the values are float32."""

    codes: TensorSpec  # (rows, columns), int8
    absmax: TensorSpec  # (rows), float32
    scheme: str | None = None

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read the codes and multiply them, row by row."""
        for begin, piece in pieces(start, out, spec.dtype):
            piece.copy_(self.codes.elements(reader, begin, piece.numel()))
            for row, _, part in by_rows(begin, piece, spec.shape[-1]):
                part.mul_(self.absmax.elements(reader, row, len(part))[:, None])
            piece.mul_(ONE_127TH)

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype of the codes."""
        return self.codes.dtype

    @property
    def block(self) -> Block:
        """A row."""
        return 1, self.codes.shape[-1]

    @property
    def key(self) -> tuple[object, ...]:
        """The codes and the magnitudes."""
        return self.codes.key, self.absmax.key
