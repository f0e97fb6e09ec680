"""Tensors that are made of one other, and have on disk what that has."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec


@dataclass(frozen=True, slots=True)
class Derived(Encoding):
    """A tensor made of a stored one; what is on disk is that one's."""

    stored: TensorSpec

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return what the stored tensor's elements are on disk."""
        return self.stored.stored_dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes of ``count`` elements of the stored tensor."""
        return self.stored.stored_bytes(count)

    @property
    def block(self) -> Block | None:
        """The stored tensor's block."""
        return self.stored.encoding.block

    @property
    def key(self) -> tuple[object, ...]:
        """The stored tensor, and what is done to it."""
        return type(self).__name__, self.stored.key
