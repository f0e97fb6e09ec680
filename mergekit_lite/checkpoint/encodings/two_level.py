"""Scales of two levels, as NVFP4 has them: one for a few elements, in float8, and one for the whole tensor."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.pieces import pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Encoding, TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class TwoLevel(Encoding):
    """``local / general`` or ``local · general``, float32."""

    local: TensorSpec  # of the same shape
    general: TensorSpec  # one element, float32
    divided: bool  # by the general scale, as compressed-tensors does; ModelOpt multiplies

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Put both levels together."""
        general = self.general.elements(reader, 0, 1)
        for begin, piece in pieces(start, out, spec.dtype):
            local = self.local.elements(reader, begin, piece.numel()).to(torch.float32)
            piece.copy_(local.div_(general) if self.divided else local.mul_(general))

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype of the local scales."""
        return self.local.dtype

    @property
    def key(self) -> tuple[object, ...]:
        """Both scales, and how they are put together."""
        return self.local.key, self.general.key, self.divided
