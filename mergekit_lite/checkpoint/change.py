"""What is added to a tensor while it is read: adapters and task vectors, as data.

A changed tensor is ``base + Σ term``, summed in float64 in the order of the terms. A term is one way to store a
difference of two tensors; its ``parts`` are the stored tensors it is made of, its ``scale`` multiplies it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mergekit_lite.checkpoint.tensor import TensorSpec

CHUNK = 1 << 16  # elements of a tensor that share an entry of ``Sparse.starts``; a place in one fits into 16 bits


@dataclass(frozen=True, slots=True)
class LowRank:
    """``left · right``, (rows, rank) and (rank, columns), in the base's orientation, as views of what is stored."""

    left: TensorSpec
    right: TensorSpec
    scale: float = 1.0

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The factors."""
        return self.left, self.right


@dataclass(frozen=True, slots=True)
class Dense:
    """A value for every element."""

    values: TensorSpec
    scale: float = 1.0

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The values."""
        return (self.values,)


@dataclass(frozen=True, slots=True)
class Sparse:
    """Values for some elements, the others are zero. Any block of elements can be read by itself.

    The elements are counted through in chunks of ``CHUNK``: chunk i has the ``values`` from ``starts[i]`` up to
    ``starts[i + 1]`` (int64), at the ``places`` in the chunk (uint16, ascending).
    """

    starts: TensorSpec
    places: TensorSpec
    values: TensorSpec
    scale: float = 1.0

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The index and the values."""
        return self.starts, self.places, self.values


@dataclass(frozen=True, slots=True)
class Signs:
    """``± size`` with one size for each row (BitDelta, arXiv 2402.10193, has one for each matrix).

    ``bits`` (uint8) has a bit for each element, the lowest of a byte first, set where it is positive.
    """

    bits: TensorSpec
    sizes: TensorSpec
    scale: float = 1.0

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Signs and sizes."""
        return self.bits, self.sizes


@dataclass(frozen=True, slots=True)
class Replace:
    """``target − origin``: what a tensor that an adapter replaces comes to where it isn't replaced in full."""

    target: TensorSpec
    origin: TensorSpec
    scale: float = 1.0

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Both."""
        return self.target, self.origin


Term = LowRank | Dense | Sparse | Signs | Replace


@dataclass(frozen=True, slots=True)
class Change:
    """``base + Σ term``; without a base the terms alone."""

    base: TensorSpec | None
    terms: tuple[Term, ...]

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Every tensor that is read for it."""
        base = () if self.base is None else (self.base,)
        return base + tuple(part for term in self.terms for part in term.parts)


def scaled(terms: tuple[Term, ...], scale: float) -> tuple[Term, ...]:
    """The terms times a number."""
    return tuple(replace(term, scale=term.scale * scale) for term in terms)


def changed(own: TensorSpec, terms: tuple[Term, ...], name: str, wide: bool = False) -> TensorSpec:
    """A tensor under this name with some terms (more) added to it: float32, or float64 where the base is or ``wide``.

    It is written in the dtype of the base unless another is asked for.
    """
    change = own.change or Change(replace(own, name=name), ())
    change = replace(change, terms=change.terms + terms)
    return replace(
        own,
        name=name,
        dtype="float64" if wide or own.dtype == "float64" else "float32",
        strides=None,
        scale=None,
        change=change,
        written_as=own.written_as or own.dtype,
    )


def origin(spec: TensorSpec) -> TensorSpec:
    """The tensor as it was before anything was added to it."""
    return spec.change.base if spec.change is not None and spec.change.base is not None else spec
