"""What the header of a weight file says, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lite.checkpoint.stores.files import StorePath
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError, shortened

MAX_NAME = 1000


@dataclass(frozen=True, slots=True)
class WeightFile:
    """The identity of one file of weights, taken when its header was read."""

    path: Path
    size: int
    mtime_ns: int
    header_digest: str
    etag: str = ""  # of a file elsewhere
    folder: str = ""  # where it lies in its model's folder; empty for the folder itself, and for a single file

    @property
    def name(self) -> str:
        """Its path in the folder of its model."""
        return f"{self.folder}/{self.path.name}" if self.folder else self.path.name

    @classmethod
    def identify(cls, path: Path, header: bytes) -> WeightFile:
        """Return the identity of a file: its size, its time and the digest of its header."""
        status = path.stat()
        remote = path.remote if isinstance(path, StorePath) else None
        etag = remote.etag if remote else ""
        return cls(path, status.st_size, status.st_mtime_ns, xxhash.xxh3_128_hexdigest(header), etag)

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


@dataclass(frozen=True)
class Header:
    """What one file of weights holds."""

    file: WeightFile
    tensors: Mapping[str, TensorSpec]  # by name, in the order of their bytes
    metadata: Mapping[str, str] = field(default_factory=dict)  # free-form text; empty in a format without metadata
    nest: tuple[str, ...] = ()  # the keys that the tensors are under: ("model",) for a torch file of {"model": {...}}
    left_out: tuple[str, ...] = ()  # names of what are not tensors of the model, such as an epoch or an optimizer
    values: Mapping[str, Any] | None = None  # what a GGUF says of its model, by llama.cpp's keys


def check_name(file: Path, name: str) -> None:
    """Raise CheckpointError where a tensor's name is too long or has characters that a terminal would obey."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(
            f"{file}: a tensor's name {shortened(repr(name), 80)} is longer than {MAX_NAME} characters or has "
            "unprintable ones. The file is damaged or forged."
        )
