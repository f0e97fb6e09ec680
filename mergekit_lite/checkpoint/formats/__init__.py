"""The file formats of weights, each a module here that has what ``Format`` lists and stands in ``FORMATS``.

A stored element type of its own is an encoding (see ``checkpoint/encodings``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mergekit_lite.checkpoint.formats import gguf, safetensors, torch
from mergekit_lite.checkpoint.formats.header import Header
from mergekit_lite.errors import CheckpointError
from mergekit_lite.object_stores import Place


class Format(Protocol):
    """What the module of a format has."""

    @property
    def SUFFIXES(self) -> tuple[str, ...]:
        """How the names of its files end."""

    @property
    def MODEL_NAMES(self) -> tuple[str, ...]:
        """What its files are named in the folder of a model; with ``.index.json`` behind it, the index of shards."""

    @property
    def ADAPTER_NAMES(self) -> tuple[str, ...]:
        """What its files are named in the folder of a LoRA adapter."""

    def read_header(self, path: Path) -> Header:
        """Read a file's header, but no weight. Raises CheckpointError where it is damaged, hostile or not supported."""


FORMATS: tuple[Format, ...] = (safetensors, torch, gguf)  # of a folder that has several, the first is read
WRITTEN_SUFFIXES = (*safetensors.SUFFIXES, *torch.SUFFIXES)
SUFFIXES = tuple(suffix for format in FORMATS for suffix in format.SUFFIXES)
_BY_SUFFIX = {suffix: format for format in FORMATS for suffix in format.SUFFIXES}


def is_written(path: Path | Place) -> bool:
    """Return whether a file's name is one of a format that is written, not only read."""
    return path.suffix in WRITTEN_SUFFIXES


def read_header(path: Path, within: str = "") -> Header:
    """Read a header in the format that the suffix names, as ``Format.read_header``; CheckpointError where none does.

    ``within`` names the keys of a torch file that hold the weights, with dots between them.
    """
    if within:
        return torch.read_header(path, within)
    if path.suffix in _BY_SUFFIX:
        return _BY_SUFFIX[path.suffix].read_header(path)
    raise CheckpointError(f"{path}: not a weight file; expected one of {', '.join(SUFFIXES)}, or a folder.")
