"""What no file holds: numbers drawn by their index, and numbers that are given. Both are added, or stand alone.

Drawing needs no torch, whose import takes longer than all of a small mixture.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import xxhash

from mergekit_lite import draws, dtypes
from mergekit_lite.checkpoint.encodings.pieces import PIECE
from mergekit_lite.checkpoint.encodings.sum import Sum, Term
from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.checkpoint.tensor import Encoding, TensorSpec
from mergekit_lite.deferred import np, torch

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Drawn(Term):
    """Draws that depend on the seed, a name and an element's index alone."""

    seed: int
    name: str

    @property
    def key(self) -> tuple[object, ...]:
        """That of any term, the seed and the name."""
        return *super(Drawn, self).key, self.seed, self.name

    @abstractmethod
    def values(self, start: int, count: int) -> npt.NDArray[np.float64]:
        """Return the draws of the elements ``start … start + count``, times ``scale``."""

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the draws."""
        into = total.numpy()
        into += self.values(start, len(into))

    def uniform(self, stream: int, start: int, count: int) -> npt.NDArray[np.float64]:
        """Return draws from (0, 1), of 32 bits, for the elements ``start … start + count``."""
        key, end = draws.stream_key(self.seed, self.name, stream), start + count
        edges = [start, *range((start // draws.WORDS + 1) * draws.WORDS, end, draws.WORDS), end]
        drawn = np.concatenate([draws.words(key, begin, stop - begin) for begin, stop in pairwise(edges)])
        numbers: npt.NDArray[np.float64] = (drawn ^ np.uint32(1 << 31)).astype(np.float64)
        return (numbers + 0.5) * 2.0**-32


@dataclass(frozen=True, slots=True)
class Gaussian(Drawn):
    """N(0, 1), by the transform of Box and Muller from two draws of an element."""

    def values(self, start: int, count: int) -> npt.NDArray[np.float64]:
        """Return the draws."""
        radius, angle = self.uniform(1, start, count), self.uniform(2, start, count)
        normal: npt.NDArray[np.float64] = np.sqrt(np.log(radius) * -2) * np.cos(angle * (2 * math.pi)) * self.scale
        return normal


@dataclass(frozen=True, slots=True)
class Uniform(Drawn):
    """Uniform from −1 to 1."""

    def values(self, start: int, count: int) -> npt.NDArray[np.float64]:
        """Return the draws."""
        return (self.uniform(0, start, count) * 2 - 1) * self.scale


@dataclass(frozen=True, slots=True)
class DrawnAlone(Encoding):
    """A tensor that is the sum of draws, rounded to its dtype, float32 or float64; zeros of any dtype without draws."""

    draws: tuple[Drawn, ...]

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Draw piece by piece."""
        if not self.draws:
            np.frombuffer(out, np.uint8)[:] = 0
            return
        values = np.frombuffer(out, spec.dtype)
        for done in range(0, len(values), PIECE):
            part = values[done : done + PIECE]
            part[:] = sum(drawn.values(start + done, len(part)) for drawn in self.draws)

    def all_bytes(self, spec: TensorSpec) -> int:
        """Return 0: no file holds it."""
        return 0

    def needs_torch(self, spec: TensorSpec) -> bool:
        """Return False."""
        return False

    @property
    def key(self) -> tuple[object, ...]:
        """That of a sum of the draws, which is the same."""
        return Sum(None, self.draws).key


@dataclass(frozen=True, slots=True)
class Given(Term):
    """Values of a dtype, all of them in memory: for small tensors that were computed, not read."""

    values: bytes
    dtype: str

    @property
    def key(self) -> tuple[object, ...]:
        """That of any term, and a digest of the values."""
        return *super(Given, self).key, self.dtype, xxhash.xxh3_128_hexdigest(self.values)

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the values."""
        size = dtypes.size(self.dtype)
        part = bytearray(self.values[start * size : (start + len(total)) * size])
        total += tensor_of(memoryview(part), self.dtype).double().mul_(self.scale)


def unstored(like: TensorSpec, name: str, dtype: str, shape: tuple[int, ...], *terms: Term) -> TensorSpec:
    """Return a tensor that is the sum of terms, zeros without any; it stands with the file of another, unread."""
    drawn = tuple(term for term in terms if isinstance(term, Drawn))
    encoding = DrawnAlone(drawn) if len(drawn) == len(terms) else Sum(None, terms)
    return TensorSpec(name, dtype, shape, like.file, like.offset, encoding)
