"""Terms that no file holds: numbers drawn by their index, and numbers that are given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from mergekit_lite import draws, dtypes
from mergekit_lite.checkpoint.encodings.sum import Sum, Term
from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch


@dataclass(frozen=True, slots=True)
class Drawn(Term):
    """Draws that depend on the seed, a name and an element's index alone."""

    seed: int
    name: str

    @property
    def key(self) -> tuple[object, ...]:
        """That of any term, the seed and the name."""
        return *super(Drawn, self).key, self.seed, self.name

    def uniform(self, stream: int, start: int, count: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield draws from (0, 1), of 32 bits, in float64, with the index of the first one in ``start … + count``."""
        key, end = draws.stream_key(self.seed, self.name, stream), start + count
        while start < end:
            number = min(end, (start // draws.WORDS + 1) * draws.WORDS) - start
            yield start, (draws.bits(key, start, number).double() + (0.5 + (1 << 31))) * 2.0**-32
            start += number


@dataclass(frozen=True, slots=True)
class Gaussian(Drawn):
    """N(0, 1), by the transform of Box and Muller from two draws of an element."""

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the draws."""
        pairs = zip(self.uniform(1, start, len(total)), self.uniform(2, start, len(total)), strict=True)
        for (begin, radius), (_, angle) in pairs:
            normal = radius.log_().mul_(-2).sqrt_().mul_(angle.mul_(2 * math.pi).cos_())
            total[begin - start :][: len(normal)] += normal.mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Uniform(Drawn):
    """Uniform from −1 to 1."""

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the draws."""
        for begin, drawn in self.uniform(0, start, len(total)):
            total[begin - start :][: len(drawn)] += drawn.mul_(2).sub_(1).mul_(self.scale)


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
    return TensorSpec(name, dtype, shape, like.file, like.offset, Sum(None, terms))
