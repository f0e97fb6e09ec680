"""Rows of tokens that a model lacks, rebuilt from those that it shares with another one.

Each is a sum of the model's own rows of shared tokens. What it is a sum of is found among the other model's rows of the
same tokens, which knows them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.gathered import Places, gathered
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.deferred import np, torch

if TYPE_CHECKING:
    import numpy.typing as npt

    from mergekit_lite.checkpoint.encodings.pursuit import Atoms, Combination

OMP, NEAREST, MEAN = "omp", "nearest", "mean"
BASIS_BYTES = 1 << 27  # of the directions of the rows that are rebuilt at once: 134 MB
NOBODY = -1  # as the target of a row: nobody has it


@dataclass(frozen=True, slots=True, eq=False)
class Sharing:
    """The rows of the tokens that two models share: those of the ``model``, and those of the ``other`` one.

    ``rows`` and ``others`` (N, int32) are their numbers there, in the same order.
    """

    model: TensorSpec
    other: TensorSpec
    rows: npt.NDArray[np.int32]
    others: npt.NDArray[np.int32]

    def atoms(self, reader: Reader) -> Atoms:
        """Read the other model's rows of shared tokens."""
        from mergekit_lite.checkpoint.encodings.pursuit import Atoms

        return Atoms(_rows(reader, self.other, self.others))

    def rows_of_model(self, reader: Reader, rows: npt.NDArray[np.int32]) -> torch.Tensor:
        """Read rows of the model, float64."""
        return _rows(reader, self.model, rows).double()

    def rows_of_other(self, reader: Reader, rows: npt.NDArray[np.int32]) -> torch.Tensor:
        """Read rows of the other model, float64."""
        return _rows(reader, self.other, rows).double()

    def summed(self, reader: Reader, combination: Combination) -> torch.Tensor:
        """Return sums of the model's rows of shared tokens, float64: (B, width)."""
        used, places = torch.unique(combination.chosen, return_inverse=True)
        rows = _rows(reader, self.model, self.rows[used.numpy()])
        sums = [
            coefficients @ rows[of_target].double()
            for of_target, coefficients in zip(places, combination.coefficients, strict=True)
        ]
        return torch.stack(sums)

    def mean(self, reader: Reader) -> torch.Tensor:
        """Return the mean of the model's rows of shared tokens, float64: (width,)."""
        step = max(1, (1 << 20) // _width(self.model))
        parts = [self.rows[begin : begin + step] for begin in range(0, len(self.rows), step)]
        total = torch.stack([self.rows_of_model(reader, part).sum(0) for part in parts]).sum(0)
        return total / len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Rebuilt(Encoding):
    """A matrix some of whose rows are rebuilt, and all others as they are in ``kept``.

    ``missing`` (M, int32) are the numbers of these rows, ascending; ``targets`` (M, int32) where each of them lies in
    the other model, or −1: then it is the mean of all shared ones.
    """

    kept: TensorSpec
    sharing: Sharing
    missing: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    method: str
    k: int
    digest: str

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return what the model's elements are on disk."""
        return self.kept.stored_dtype

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes of ``count`` of the model's elements."""
        return self.kept.stored_bytes(count)

    @property
    def block(self) -> Block | None:
        """None: rows are values."""
        return None

    @property
    def is_quantised(self) -> bool:
        """Whether the model's rows are."""
        return self.kept.quantised

    @property
    def is_shared(self) -> bool:
        """True: the other model's rows of shared tokens are remembered."""
        return True

    @property
    def key(self) -> tuple[object, ...]:
        """What the rows are made of, and how."""
        return "Rebuilt", self.digest

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read the rows that are there, and put the rebuilt ones among them.

        They are made in blocks of a fixed beginning and length, so that their bits don't depend on what is asked for.
        """
        self.kept.fill(reader, start, out)
        size, width = dtypes.size(spec.dtype), _width(spec)
        end = start + len(out) // size
        first, last = np.searchsorted(self.missing, [start // width, -(-end // width)]).tolist()
        length = rows_at_once(_width(self.sharing.other), self.k)
        for number in range(first // length, -(-last // length)):
            made = reader.remembered((self.digest, number), lambda number=number: self._block(reader, number, length))  # type: ignore[misc]
            for at in range(max(first, number * length), min(last, (number + 1) * length)):
                row = int(self.missing[at]) * width
                begin, upto = max(start, row), min(end, row + width)
                data = bytes_of(made[at - number * length])
                out[(begin - start) * size : (upto - start) * size] = data[(begin - row) * size : (upto - row) * size]

    def _block(self, reader: Reader, number: int, length: int) -> torch.Tensor:
        """Rebuild the rows ``number · length …`` of those that are missing."""
        targets = self.targets[number * length : (number + 1) * length]
        width = _width(self.sharing.model)
        rows = torch.empty(len(targets), width, dtype=torch.float64)
        has = torch.from_numpy(targets != NOBODY)
        if self.method == MEAN or not has.all():
            rows[:] = reader.remembered((self.digest, "mean"), lambda: self.sharing.mean(reader))
        if self.method != MEAN and has.any():
            atoms = reader.remembered((self.digest, "atoms"), lambda: self.sharing.atoms(reader))
            wanted = self.sharing.rows_of_other(reader, targets[has.numpy()])
            rows[has] = self.sharing.summed(reader, combination(self.method, wanted, atoms, self.k))
        return rows.to(dtypes.torch_dtype(self.kept.dtype))


def combination(method: str, targets: torch.Tensor, atoms: Atoms, k: int) -> Combination:
    """Return by ``omp`` or ``nearest`` what sums of ``k`` atoms targets (B, D) are."""
    from mergekit_lite.checkpoint.encodings import pursuit

    return (pursuit.pursued if method == OMP else pursuit.nearest)(targets, atoms, k)


def rows_at_once(width: int, k: int) -> int:
    """Return how many rows are rebuilt at once: their directions, k · width · 8 bytes each, take 134 MB at most."""
    return max(1, min(128, BASIS_BYTES // (8 * k * width)))


def rebuilt(
    kept: TensorSpec,
    sharing: Sharing,
    missing: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
    method: str,
    k: int,
) -> TensorSpec:
    """Return ``kept`` with rebuilt rows; the arguments are as of ``Rebuilt``."""
    numbers = (sharing.rows, sharing.others, missing, targets)
    described = (kept.key, sharing.model.key, sharing.other.key, method, k, [array.tobytes() for array in numbers])
    digest = xxhash.xxh3_128_hexdigest(repr(described).encode())
    return replace(kept, encoding=Rebuilt(kept, sharing, missing, targets, method, k, digest))


def _width(spec: TensorSpec) -> int:
    return spec.numel // spec.shape[0]


def _rows(reader: Reader, spec: TensorSpec, rows: npt.NDArray[np.int32]) -> torch.Tensor:
    """Read some rows of a matrix: (number of rows, width), in its dtype."""
    places = Places(np.zeros(len(rows), np.int32), np.asarray(rows, np.int32))
    some = gathered(spec, [spec], places)
    return some.elements(reader, 0, some.numel).view(len(rows), -1)
