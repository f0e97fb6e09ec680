"""Files that statistics are written to, and what stands beside them until a command has ended."""

from __future__ import annotations

from pathlib import Path

from mergekit_lite.checkpoint.formats.safetensors import SUFFIXES
from mergekit_lite.errors import UsageError


def checked_output(path: Path, force: bool) -> Path:
    """Return the path of the output. Raises UsageError where no such file can be written, or one is there.

    One that is there beside its ledger may be of a command that was killed before all of its files had their names.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: statistics are a {SUFFIXES[0]} file: give the output a name that ends so.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: {'is a folder' if path.is_dir() else 'its folder is not there'}. Name another file.")
    if path.exists() and not force and not rows_of(path).exists():
        raise is_there(path)
    return path


def is_there(path: Path) -> UsageError:
    """Return the error for an output that is to be written, and exists."""
    return UsageError(f"{path} exists. Name another file, or replace it by --force.")


def ledger_of(path: Path) -> Path:
    """Return the path of the ledger of what is in an unfinished output."""
    return path.with_name(f"{path.name}.done.jsonl")


def rows_of(path: Path) -> Path:
    """Return the file in which that ledger has its rows while the output is unfinished."""
    return path.with_name(f"{path.name}.done.partial.jsonl")
