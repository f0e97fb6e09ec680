"""What the headers tell of a checkpoint's tensors and files, before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.errors import CheckpointError, shortened

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.change import Change

Block = tuple[int, int]  # rows, columns
MAX_NAME = 1000


def check_name(file: Path, name: str) -> None:
    """Raise CheckpointError where a tensor's name is endless, or has characters that play tricks on a terminal."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(
            f"{file}: a tensor's name {shortened(repr(name), 80)} is longer than {MAX_NAME} characters or has "
            "unprintable ones. The file is damaged or forged."
        )


@dataclass(frozen=True, slots=True)
class Scale:
    """How stored codes become values: value = code × scale, one scale for each block of the matrix.

    ``codes`` is the dtype on disk and ``spec`` the scale tensor, which may lie in another file. ``block`` is the (rows,
    columns) that share one scale: (128, 128) is DeepSeek's block FP8, (1, columns) one scale a row, (rows, columns) one
    a matrix. A scale of a single element is for the whole tensor, also where that is a stack of matrices.
    """

    codes: str
    spec: TensorSpec
    block: Block


def grid(matrix: Block, block: Block) -> Block:
    """How many rows and columns of blocks cover a matrix, ragged blocks at the edges included."""
    return -(-matrix[0] // block[0]), -(-matrix[1] // block[1])


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its name, dtype and shape, and where its bytes lie.

    ``dtype`` is what a reader gets. ``strides`` (in elements) is given only for the rare tensor of a torch file that is
    not laid out row by row; ``scale`` only for one that is stored quantised: its ``dtype`` is the dequantised one;
    ``change`` only for one that adapters or task vectors add to: it lies where its base lies. ``written_as`` is the
    dtype it takes in an output unless another is asked for, where that is not ``dtype``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None
    scale: Scale | None = None
    change: Change | None = None
    written_as: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def as_stored(self) -> bool:
        """Whether its elements are read as they lie on disk, one behind the other."""
        return self.change is None and self.scale is None and self.strides is None

    @property
    def stored_dtype(self) -> str:
        """The dtype of the bytes on disk."""
        if self.change:
            return self.change.base.stored_dtype if self.change.base else self.dtype
        return self.scale.codes if self.scale else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk, those of what is added to it included."""
        if self.change:
            return sum(part.nbytes for part in self.change.parts)
        return self.numel * dtypes.size(self.stored_dtype)

    @property
    def quantised(self) -> bool:
        """Whether it is dequantised when it is read."""
        if self.change:
            return self.change.base is not None and self.change.base.quantised
        return self.scale is not None

    def transposed(self) -> TensorSpec:
        """The same matrix seen with its rows as columns."""
        rows, columns = self.shape
        return replace(self, shape=(columns, rows), strides=(self.strides or (columns, 1))[::-1])


@dataclass(frozen=True, slots=True)
class WeightFile:
    """The identity of one file of weights, taken when its header was read."""

    path: Path
    size: int
    mtime_ns: int
    header_digest: str

    @classmethod
    def identify(cls, path: Path, header: bytes) -> WeightFile:
        """Note size, time and header digest of a file."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns, xxhash.xxh3_128_hexdigest(header))

    def check_unchanged(self) -> None:
        """Raise CheckpointError where the file is no longer the one whose header was read."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise CheckpointError(f"{self.path}: was readable when planned, but now: {error.strerror}") from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CheckpointError(
                f"{self.path}: changed since it was planned (size {self.size:,} then, {status.st_size:,} now). "
                "Leave the inputs alone while they are read, and start again."
            )
