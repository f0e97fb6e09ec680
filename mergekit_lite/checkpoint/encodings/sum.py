"""A tensor and what is added to it while it is read: ``base + Σ term``, in float64, rounded once to its dtype.

Every element is computed from its own numbers alone and in the order of the terms, so no cut shows in the bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from mergekit_lite.checkpoint.encodings.pieces import pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.deferred import torch

Expected = Mapping[TensorSpec, tuple[tuple[int, ...], tuple[str, ...]]]  # each part's shape, and dtypes it may have


@dataclass(frozen=True, slots=True)
class Term(ABC):
    """A stored difference of two tensors, to be added ``scale`` times. Each way to store one is a class of its own."""

    scale: float = field(default=1.0, kw_only=True)

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The stored tensors it is made of."""
        values = (getattr(self, part.name) for part in fields(self))
        return tuple(value for value in values if isinstance(value, TensorSpec))

    @property
    def key(self) -> tuple[object, ...]:
        """Plain data that is equal for two terms only where they add equal values from equal files."""
        return type(self).__name__, self.scale, [part.key for part in self.parts]

    @abstractmethod
    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the elements from ``start`` on of a tensor of this shape, times ``scale``, to ``total`` (1-D, float64).

        Raises:
            RunError: a file can't be read, or is damaged.
        """


@dataclass(frozen=True, slots=True)
class VectorTerm(Term):
    """A term as a task vector stores it. Its file may come from anybody, so its parts are checked on opening."""

    @abstractmethod
    def expected(self, name: str, shape: tuple[int, ...]) -> Expected:
        """Return what the parts should be for a tensor of this shape; CheckpointError where it can't be stored so."""

    def check_values(self) -> None:
        """Raise CheckpointError where values are wrong that later reads rely on. Most terms have none such."""


@dataclass(frozen=True, slots=True)
class Sum(Encoding):
    """``base + Σ term``; without a base the terms alone."""

    base: TensorSpec | None
    terms: tuple[Term, ...] = ()

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Sum the elements piece by piece, and round."""
        for begin, piece in pieces(start, out, spec.dtype):
            if self.base is None:
                total = torch.zeros(piece.numel(), dtype=torch.float64)
            else:
                total = self.base.elements(reader, begin, piece.numel()).double()
            for term in self.terms:
                term.add(reader, spec.shape, begin, total)
            piece.copy_(total)

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return the dtype that the base is stored in."""
        return self.base.stored_dtype if self.base else spec.dtype

    def all_bytes(self, spec: TensorSpec) -> int:
        """Return the bytes of the base and of the terms' parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Every tensor that is read for it."""
        base = () if self.base is None else (self.base,)
        return base + tuple(part for term in self.terms for part in term.parts)

    @property
    def block(self) -> Block | None:
        """The block of the base."""
        return self.base.encoding.block if self.base else None

    @property
    def scheme(self) -> str | None:
        """The scheme of the base."""
        return self.base.encoding.scheme if self.base else None

    @property
    def key(self) -> tuple[object, ...]:
        """The base, and the terms."""
        return (self.base.key if self.base else None), [term.key for term in self.terms]


def scaled(terms: tuple[Term, ...], scale: float) -> tuple[Term, ...]:
    """Return the terms times a number."""
    return tuple(replace(term, scale=term.scale * scale) for term in terms)


def with_terms(spec: TensorSpec, terms: tuple[Term, ...], name: str, wide: bool = False) -> TensorSpec:
    """Return a tensor, under another name, with terms added to it behind those that it has.

    It is float64 if ``wide``, or if the tensor is, else float32; and is written in the tensor's dtype unless another is
    asked for.
    """
    before = spec.encoding if isinstance(spec.encoding, Sum) else Sum(replace(spec, name=name))
    return replace(
        spec,
        name=name,
        dtype="float64" if wide or spec.dtype == "float64" else "float32",
        encoding=Sum(before.base, before.terms + terms),
        written_as=spec.written_as or spec.dtype,
    )


def base_of(spec: TensorSpec) -> TensorSpec:
    """Return the tensor as it was before anything was added to it."""
    base = spec.encoding.base if isinstance(spec.encoding, Sum) else None
    return base or spec
