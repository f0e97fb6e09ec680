"""Ways to store a difference: exactly, its largest elements, its signs, or the tensor itself.

An encoder looks at a difference once to tell which parts it will write (``measure``), then writes them (``write``) and
returns the sum of squares of what it threw away. A difference of two floats of one format is the sum of two others
(Dekker 1971): ``dense`` rounds it to the format, and puts what that leaves, where it leaves anything, beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.change import CHUNK
from mergekit_lite.checkpoint.pieces import by_rows
from mergekit_lite.errors import RunError
from mergekit_lite.methods.contract import Reduction, TensorInfo, Totals, answered
from mergekit_lite.methods.statistics import largest
from mergekit_lite.methods.tensor_merge import joined
from mergekit_lite.ops.torch_ops import figures_of
from mergekit_lite.vectors.pairs import BLOCK, Difference, bits, read

Put = Callable[[str, int, torch.Tensor], None]  # (part, index of the first element, values)


class Part(NamedTuple):
    """A tensor of the file: what is put behind the tensor's name, dtype, shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Sketch:
    """The parts that will be written, and what the encoder wants to remember until then."""

    parts: tuple[Part, ...]
    memory: Any = None


class Encoder(Protocol):
    """One way to store a difference."""

    def measure(self, difference: Difference) -> Sketch:
        """Look at it: which parts, how long?"""

    def write(self, difference: Difference, sketch: Sketch, put: Put) -> float:
        """Write the parts. Returns ‖what is thrown away‖²."""


class Whole:
    """The tuned model's tensor, as it is."""

    def measure(self, difference: Difference) -> Sketch:
        """One part: the tensor."""
        tuned = difference.pair.tuned
        return Sketch((Part("whole", tuned.dtype, tuned.shape),))

    def write(self, difference: Difference, sketch: Sketch, put: Put) -> float:
        """Copy it."""
        tuned = difference.pair.tuned
        for start in range(0, tuned.numel, BLOCK):
            put("whole", start, read(difference.reader, tuned, start, min(BLOCK, tuned.numel - start)))
        return 0.0


class Dense:
    """Every difference, so that base + difference is the tuned model to the bit."""

    def measure(self, difference: Difference) -> Sketch:
        """Count in each chunk what rounding leaves. Raises RunError where no two floats hold the difference."""
        pair = difference.pair
        counts: list[int] = []
        for _, base, tuned in difference.blocks():
            rounded, rest = split(base, tuned, pair.stored)
            _check_exact(difference, base, tuned, rounded, rest)
            counts += counted(_told(rest))
        parts = (Part("", pair.stored, pair.tuned.shape),)
        return Sketch(parts + (sparse_parts(counts, pair.stored) if any(counts) else ()), counts)

    def write(self, difference: Difference, sketch: Sketch, put: Put) -> float:
        """Write the rounded differences, and beside them what that left."""
        rests = SparseWriter(sketch.memory, put) if len(sketch.parts) > 1 else None
        for start, base, tuned in difference.blocks():
            rounded, rest = split(base, tuned, difference.pair.stored)
            put("", start, rounded)
            if rests is not None:
                rests.add(_told(rest), rest)
        return 0.0


@dataclass(frozen=True)
class Sparse:
    """The largest differences of each tensor: a share of them (``density``), or those from ``threshold`` on."""

    density: float | None = None
    threshold: float | None = None

    def measure(self, difference: Difference) -> Sketch:
        """Find the threshold; count in each chunk what is kept."""
        kept = self._kept(difference)
        counts = [count for start, delta in difference.deltas() for count in counted(kept(delta, start))]
        return Sketch(sparse_parts(counts, difference.pair.stored), (kept, counts))

    def write(self, difference: Difference, sketch: Sketch, put: Put) -> float:
        """Write what is kept."""
        kept, counts = sketch.memory
        writer = SparseWriter(counts, put)
        lost = []
        for start, delta in difference.deltas():
            mask, values = kept(delta, start), delta.to(dtypes.torch_dtype(difference.pair.stored))
            writer.add(mask, values)
            lost.append((delta - values.double() * mask).square_().sum().item())
        return math.fsum(lost)

    def _kept(self, difference: Difference) -> Callable[[torch.Tensor, int], torch.Tensor]:
        if self.threshold is not None:
            threshold = self.threshold
            return lambda delta, _: (delta.abs() >= threshold) & (delta != 0)
        tensor = difference.pair.tuned
        wanted = round((self.density or 0.0) * tensor.numel)
        info = TensorInfo(tensor.name, tensor.shape, 1, False)
        steps = largest(info, lambda block, _: [block[0].abs().float()], lambda *_: [wanted], sampled=False)
        [[cut]] = answered(steps, lambda reduction: _total(reduction, difference))
        return lambda delta, start: (cut.mask(delta.abs().float(), start) != 0) & (delta != 0)


class Signs:
    """The signs, and for each row the mean magnitude, which is the size that throws the least away."""

    def measure(self, difference: Difference) -> Sketch:
        """Always the same parts."""
        shape = difference.pair.tuned.shape
        return Sketch((Part("bits", "uint8", (-(-math.prod(shape) // 8),)), Part("sizes", "float32", (rows(shape),))))

    def write(self, difference: Difference, sketch: Sketch, put: Put) -> float:
        """Write the signs, and at last the sizes."""
        shape = difference.pair.tuned.shape
        lengths = torch.zeros(rows(shape), dtype=torch.float64)
        square = []
        for start, delta in difference.deltas():
            packed = np.packbits((delta >= 0).numpy(), bitorder="little")
            put("bits", start // 8, torch.from_numpy(packed))
            square.append(delta.square().sum().item())
            for row, _, part in by_rows(start, delta.abs_(), shape[-1]):
                lengths[row : row + len(part)] += part.sum(1)
        sizes = (lengths / shape[-1]).float()
        put("sizes", 0, sizes)
        wide = sizes.double()
        explained = (2 * wide * lengths - shape[-1] * wide.square()).sum().item()
        return max(0.0, math.fsum(square) - explained)


@dataclass
class SparseWriter:
    """Writes kept values block by block behind each other."""

    counts: list[int]
    put: Put
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Write the index."""
        starts = torch.zeros(len(self.counts) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor(self.counts, dtype=torch.int64), 0, out=starts[1:])
        self.put("starts", 0, starts)

    def add(self, kept: torch.Tensor, values: torch.Tensor) -> None:
        """Write the kept ones of the next block."""
        places = kept.nonzero().flatten()
        self.put("places", self.done, (places % CHUNK).to(torch.uint16))
        self.put("values", self.done, values[places])
        self.done += len(places)


def sparse_parts(counts: list[int], dtype: str) -> tuple[Part, ...]:
    """The parts of a sparse tensor with so many values in each chunk."""
    kept = (sum(counts),)
    return Part("starts", "int64", (len(counts) + 1,)), Part("places", "uint16", kept), Part("values", dtype, kept)


def counted(kept: torch.Tensor) -> list[int]:
    """How many of a block's elements are kept, chunk by chunk."""
    return [int(chunk.sum()) for chunk in torch.split(kept, CHUNK)]


def split(base: torch.Tensor, tuned: torch.Tensor, stored: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The difference as the sum of two floats of one format.

    Args:
        base, tuned: float64.
        stored: the format.

    Returns:
        The difference rounded, and what that leaves. −0 as the rest says that base + difference is −0 and not 0.
    """
    dtype = dtypes.torch_dtype(stored)
    most = torch.finfo(dtype).max
    rounded = (tuned - base).clamp_(-most, most).to(dtype)
    return rounded, (tuned - (base + rounded.double())).to(dtype)


def rows(shape: tuple[int, ...]) -> int:
    """Rows along the last axis."""
    return math.prod(shape[:-1])


def _told(rest: torch.Tensor) -> torch.Tensor:
    """Where a rest has to be stored: where it isn't 0, or is −0."""
    return (rest != 0) | rest.signbit()


def _check_exact(
    difference: Difference, base: torch.Tensor, tuned: torch.Tensor, rounded: torch.Tensor, rest: torch.Tensor
) -> None:
    """Raise RunError where adding the difference to the base would not give the tuned model's bytes."""
    pair = difference.pair
    total = base + rounded.double()
    total = torch.where(_told(rest), torch.where(total == 0, rest.double(), total + rest.double()), total)
    read_as = torch.float64 if "float64" in (pair.stored, pair.tuned.dtype) else torch.float32
    written = dtypes.torch_dtype(pair.written)
    wrong = (bits(total.to(read_as).to(written)) != bits(tuned.to(read_as).to(written))).sum().item()
    if wrong:
        raise RunError(
            f"{pair.name}: the difference can't be held by two numbers of {pair.stored} "
            f"({wrong:,} bytes of a block would differ). Use --format sparse, or cast the models to float32 first."
        )


def _total(request: Reduction, difference: Difference) -> Totals:
    """The requested sums over a difference."""
    return joined(figures_of(request.of, [delta], start).numpy() for start, delta in difference.deltas())
