"""Tensors that are made of others while they are read: results of a merge that never lie on a disk."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.tensor import Encoding, TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Made(Encoding):
    """A tensor that is computed of ``inputs``, element by element; who computes it says how (``engine.fused``)."""

    inputs: tuple[TensorSpec, ...]

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes on disk of ``count`` elements of everything that is read for them."""
        return sum(part.stored_bytes(count) for part in self.inputs)

    def all_bytes(self, spec: TensorSpec) -> int:
        """Return the bytes on disk of everything that is read for it."""
        return sum(part.nbytes for part in self.inputs)
