"""Encoders: ways to store a difference, as it is, its largest elements, its signs, or the tensor itself.

An encoder reads a difference twice: ``plan`` computes which parts it will write and how long they are, ``write`` writes
them and returns the sum of squares of what it threw away. A difference of two floats of one format is the sum of two
floats of that format (Dekker 1971): ``DenseEncoder`` rounds it to the format, and stores what the rounding left, where
it left anything, as a sparse tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.pieces import by_rows
from mergekit_lite.checkpoint.encodings.sparse import ELEMENTS_PER_START
from mergekit_lite.errors import RunError
from mergekit_lite.methods.contract import Reduction, TensorInfo, Totals, answered
from mergekit_lite.methods.statistics import largest
from mergekit_lite.methods.tensor_merge import joined
from mergekit_lite.ops.torch_ops import figures_of
from mergekit_lite.vectors.differences import READ_ELEMENTS, TensorDifference, bits

WritePart = Callable[[str, int, torch.Tensor], None]  # (part, index of the first element, values)


class StoredPart(NamedTuple):
    """One tensor of the file: the suffix of its name, its dtype and shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoragePlan:
    """The parts that an encoder will write, and what it needs to remember until then."""

    parts: tuple[StoredPart, ...]
    state: Any = None


class Encoder(Protocol):
    """One way to store a difference; ``name`` is its name in manifests."""

    name: ClassVar[str]

    def plan(self, difference: TensorDifference) -> StoragePlan:
        """Read the difference and return the parts to write, with their shapes."""

    def write(self, difference: TensorDifference, storage: StoragePlan, write_part: WritePart) -> float:
        """Write the parts, and return ‖what is thrown away‖²."""


class WholeEncoder:
    """Stores the tuned model's tensor itself."""

    name: ClassVar[str] = "whole"

    def plan(self, difference: TensorDifference) -> StoragePlan:
        """Return one part, of the tensor's dtype and shape."""
        tuned = difference.pair.tuned
        return StoragePlan((StoredPart("whole", tuned.dtype, tuned.shape),))

    def write(self, difference: TensorDifference, storage: StoragePlan, write_part: WritePart) -> float:
        """Copy the tensor."""
        tuned = difference.pair.tuned
        for start in range(0, tuned.numel, READ_ELEMENTS):
            count = min(READ_ELEMENTS, tuned.numel - start)
            write_part("whole", start, tuned.elements(difference.reader, start, count))
        return 0.0


class DenseEncoder:
    """Stores every element, so that base + difference is the tuned model to the bit."""

    name: ClassVar[str] = "dense"

    def plan(self, difference: TensorDifference) -> StoragePlan:
        """Count in each chunk the elements that rounding changes. Raises RunError where two floats are not enough."""
        pair = difference.pair
        counts: list[int] = []
        for _, base, tuned in difference.blocks():
            rounded, rest = split(base, tuned, pair.stored)
            _check_exact(difference, base, tuned, rounded, rest)
            counts += _counts(_is_stored(rest))
        parts = (StoredPart("", pair.stored, pair.tuned.shape),)
        return StoragePlan(parts + (sparse_parts(counts, pair.stored) if any(counts) else ()), counts)

    def write(self, difference: TensorDifference, storage: StoragePlan, write_part: WritePart) -> float:
        """Write the rounded difference and, where any, the sparse rest."""
        rest_writer = SparseWriter(storage.state, write_part) if len(storage.parts) > 1 else None
        for start, base, tuned in difference.blocks():
            rounded, rest = split(base, tuned, difference.pair.stored)
            write_part("", start, rounded)
            if rest_writer is not None:
                rest_writer.add(_is_stored(rest), rest)
        return 0.0


@dataclass(frozen=True)
class SparseEncoder:
    """Stores the largest elements: a share of the tensor (``density``), or those from ``threshold`` on."""

    name: ClassVar[str] = "sparse"

    density: float | None = None
    threshold: float | None = None

    def plan(self, difference: TensorDifference) -> StoragePlan:
        """Find the threshold, and count in each chunk the elements that reach it."""
        is_kept = self._selection(difference)
        counts = [count for start, delta in difference.deltas() for count in _counts(is_kept(delta, start))]
        return StoragePlan(sparse_parts(counts, difference.pair.stored), (is_kept, counts))

    def write(self, difference: TensorDifference, storage: StoragePlan, write_part: WritePart) -> float:
        """Write the selected elements."""
        is_kept, counts = storage.state
        writer = SparseWriter(counts, write_part)
        lost = []
        for start, delta in difference.deltas():
            mask, values = is_kept(delta, start), delta.to(dtypes.torch_dtype(difference.pair.stored))
            writer.add(mask, values)
            lost.append((delta - values.double() * mask).square_().sum().item())
        return math.fsum(lost)

    def _selection(self, difference: TensorDifference) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Return the function that marks which elements of a block, from an index on, are stored."""
        if self.threshold is not None:
            threshold = self.threshold
            return lambda delta, _: (delta.abs() >= threshold) & (delta != 0)
        tensor = difference.pair.tuned
        wanted = round((self.density or 0.0) * tensor.numel)
        info = TensorInfo(tensor.name, tensor.shape, 1, False)
        steps = largest(info, lambda block, _: [block[0].abs().float()], lambda *_: [wanted], sampled=False)
        [[cut]] = answered(steps, lambda reduction: _total(reduction, difference))
        return lambda delta, start: (cut.mask(delta.abs().float(), start) != 0) & (delta != 0)


class SignEncoder:
    """Stores the signs, and for each row the mean magnitude: the size that throws the least away."""

    name: ClassVar[str] = "signs"

    def plan(self, difference: TensorDifference) -> StoragePlan:
        """Return two parts: packed bits, and a size for each row."""
        shape = difference.pair.tuned.shape
        nbytes = -(-math.prod(shape) // 8)
        return StoragePlan((StoredPart("bits", "uint8", (nbytes,)), StoredPart("sizes", "float32", (_rows(shape),))))

    def write(self, difference: TensorDifference, storage: StoragePlan, write_part: WritePart) -> float:
        """Write the signs block by block, then the sizes."""
        shape = difference.pair.tuned.shape
        lengths = torch.zeros(_rows(shape), dtype=torch.float64)
        squares = []
        for start, delta in difference.deltas():
            packed = np.packbits((delta >= 0).numpy(), bitorder="little")
            write_part("bits", start // 8, torch.from_numpy(packed))
            squares.append(delta.square().sum().item())
            for row, _, part in by_rows(start, delta.abs_(), shape[-1]):
                lengths[row : row + len(part)] += part.sum(1)
        sizes = (lengths / shape[-1]).float()
        write_part("sizes", 0, sizes)
        wide = sizes.double()
        # ‖δ − s·sign(δ)‖² = ‖δ‖² − (2·s·Σ|δ| − n·s²), row by row
        explained = (2 * wide * lengths - shape[-1] * wide.square()).sum().item()
        return max(0.0, math.fsum(squares) - explained)


@dataclass
class SparseWriter:
    """Writes the selected values of a sparse tensor, block after block."""

    counts: list[int]
    write_part: WritePart
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Write where the values of each chunk start."""
        starts = torch.zeros(len(self.counts) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor(self.counts, dtype=torch.int64), 0, out=starts[1:])
        self.write_part("starts", 0, starts)

    def add(self, is_kept: torch.Tensor, values: torch.Tensor) -> None:
        """Write the selected values of the next block and their places."""
        places = is_kept.nonzero().flatten()
        self.write_part("places", self.done, (places % ELEMENTS_PER_START).to(torch.uint16))
        self.write_part("values", self.done, values[places])
        self.done += len(places)


def sparse_parts(counts: list[int], dtype: str) -> tuple[StoredPart, ...]:
    """Return the parts of a sparse tensor from the number of values in each chunk."""
    values = (sum(counts),)
    return (
        StoredPart("starts", "int64", (len(counts) + 1,)),
        StoredPart("places", "uint16", values),
        StoredPart("values", dtype, values),
    )


def _counts(is_kept: torch.Tensor) -> list[int]:
    """Count the selected elements of a block, chunk by chunk."""
    return [int(chunk.sum()) for chunk in torch.split(is_kept, ELEMENTS_PER_START)]


def split(base: torch.Tensor, tuned: torch.Tensor, stored: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the difference into the sum of two floats of one format.

    Args:
        base: 1-D, float64.
        tuned: like ``base``, of the tuned model.
        stored: name of the format's dtype.

    Returns:
        The rounded difference, and the rest, both of that dtype. A rest of −0 says that base + difference is −0, not 0.
    """
    dtype = dtypes.torch_dtype(stored)
    most = torch.finfo(dtype).max
    rounded = (tuned - base).clamp_(-most, most).to(dtype)
    return rounded, (tuned - (base + rounded.double())).to(dtype)


def _rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows along the last axis."""
    return math.prod(shape[:-1])


def _is_stored(rest: torch.Tensor) -> torch.Tensor:
    """Mark the rests that have to be stored: all but +0."""
    return (rest != 0) | rest.signbit()


def _check_exact(
    difference: TensorDifference, base: torch.Tensor, tuned: torch.Tensor, rounded: torch.Tensor, rest: torch.Tensor
) -> None:
    """Raise RunError where adding the difference to the base would not give the tuned model's bytes."""
    pair = difference.pair
    total = base + rounded.double()
    total = torch.where(_is_stored(rest), torch.where(total == 0, rest.double(), total + rest.double()), total)
    read_as = torch.float64 if "float64" in (pair.stored, pair.tuned.dtype) else torch.float32
    written = dtypes.torch_dtype(pair.written)
    wrong = (bits(total.to(read_as).to(written)) != bits(tuned.to(read_as).to(written))).sum().item()
    if wrong:
        raise RunError(
            f"{pair.name}: the difference can't be held by two numbers of {pair.stored} "
            f"({wrong:,} bytes of a block would differ). Use --format sparse, or cast the models to float32 first."
        )


def _total(reduction: Reduction, difference: TensorDifference) -> Totals:
    """Return the requested sums over a difference."""
    return joined(figures_of(reduction.of, [delta], start).numpy() for start, delta in difference.deltas())


def part_name(tensor: str, part: str) -> str:
    """Return a part's name in a file of task vectors."""
    return f"{tensor}:{part}" if part else tensor
