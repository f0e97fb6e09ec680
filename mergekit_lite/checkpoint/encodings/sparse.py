"""A difference that is zero for most elements: the others' values, with an index by which any block can be read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.sum import Expected, VectorTerm
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch
from mergekit_lite.errors import CheckpointError, RunError
from mergekit_lite.positioned import read_bytes

ELEMENTS_PER_START = 1 << 16  # elements of a tensor that share an entry of ``starts``; a place in one fits into 16 bits


@dataclass(frozen=True, slots=True)
class Sparse(VectorTerm):
    """Values for some elements, counted through in chunks of ``ELEMENTS_PER_START``; the others are zero."""

    starts: TensorSpec  # (chunks + 1), int64: chunk i has the values from ``starts[i]`` up to ``starts[i + 1]``
    places: TensorSpec  # (values), uint16: where in its chunk each value belongs, ascending
    values: TensorSpec  # (values), floats

    def add(self, reader: Reader, shape: tuple[int, ...], start: int, total: torch.Tensor) -> None:
        """Add the stored values. One takes the place of a zero, so that the sum keeps its sign: −0 isn't 0."""
        # The chunks that ``total`` touches, and how many values each of them has.
        first, last = start // ELEMENTS_PER_START, -(-(start + len(total)) // ELEMENTS_PER_START)
        starts = self.starts.elements(reader, first, last - first + 1)
        counts = starts.diff()
        inside = int(starts[0]) >= 0 and int(starts[-1]) <= self.values.numel
        if not inside or int(counts.min()) < 0 or int(counts.max()) > ELEMENTS_PER_START:
            raise self._damaged()
        # Each value's index in the tensor: its chunk's begin and its place there.
        begin, count = int(starts[0]), int(starts[-1] - starts[0])
        chunks = torch.repeat_interleave(torch.arange(first, last), counts)
        index = self.places.elements(reader, begin, count).to(torch.int64) + chunks * ELEMENTS_PER_START
        if count and int(index.diff().min() if count > 1 else 1) <= 0:
            raise self._damaged()
        # Of the values in the first and the last chunk, those that lie in ``total``.
        values = self.values.elements(reader, begin, count).double().mul_(self.scale)
        wanted = (index >= start) & (index < start + len(total))
        index, values = index[wanted] - start, values[wanted]
        before = total[index]
        total[index] = torch.where(before == 0, values, before + values)

    def expected(self, name: str, shape: tuple[int, ...]) -> Expected:
        """Return the length of the index, and one length for places and values."""
        numel = math.prod(shape)
        count = self.values.shape[:1] if self.values.shape[:1] <= (numel,) else (numel,)
        return {
            self.starts: ((-(-numel // ELEMENTS_PER_START) + 1,), ("int64",)),
            self.places: (count, ("uint16",)),
            self.values: (count, dtypes.FLOATS),
        }

    def check_values(self) -> None:
        """Raise CheckpointError where the index doesn't begin at 0 and end at the number of values."""
        with self.starts.file.open("rb") as file:
            places = (self.starts.offset + 8 * entry for entry in (0, self.starts.numel - 1))
            first, last = (
                int.from_bytes(read_bytes(file.fileno(), 8, place), "little", signed=True) for place in places
            )
        if (first, last) != (0, self.values.numel):
            raise CheckpointError(
                f"{self.starts.name}: counts from {first} to {last}, expected 0 to {self.values.numel}"
            )

    def _damaged(self) -> RunError:
        return RunError(
            f"{self.starts.file}: tensor {self.starts.name!r} doesn't count the values that are stored. "
            "The file is damaged."
        )
