"""References that are sums: ``BASE+ADAPTER``, ``BASE+v.safetensors:0.5+./adapter:-0.3``.

What is added is a task vector (a file) or a LoRA adapter (a folder or a hub repository), with ``:NUMBER`` behind it to
scale it. ``vector:`` before it says what it is and may be left out; ``rebase:`` adds a vector to another base than the
one it was made from. ``hf:STEP`` is read under the names that transformers loads
(``training.for_transformers``). ``ckpt.pt:ema`` is what a torch file, or the folder of a
training checkpoint, holds under a key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from mergekit_lite.checkpoint import hub
from mergekit_lite.checkpoint.formats import SUFFIXES, torch
from mergekit_lite.checkpoint.stores.addresses import check_elsewhere, is_elsewhere
from mergekit_lite.errors import CheckpointError, UsageError

VECTOR, REBASE = "vector:", "rebase:"
SCALED = re.compile(r"(?P<path>.+):(?P<scale>-?(\d+\.?\d*|\.\d+)([eE]-?\d+)?)")
KEYED = re.compile(rf"(?P<path>.+({'|'.join(map(re.escape, torch.SUFFIXES))})):(?P<key>[^+]+)")
KEYED_FOLDER = re.compile(r"(?P<path>.+):(?P<key>[^:+]+)")
AS_TRANSFORMERS = re.compile(r"hf(=(?P<config>[^:]+))?:(?P<rest>.+)")
MOST_PLUSES = 12


class Addition(NamedTuple):
    """What one ``+`` of a reference adds."""

    path: str  # of a task vector or an adapter, or a hub repository
    scale: float = 1.0
    rebase: bool = False  # whether a vector may be added to any base
    is_vector: bool = False  # whether it was called one

    def __str__(self) -> str:
        prefix = REBASE if self.rebase else VECTOR if self.is_vector else ""
        return f"{prefix}{self.path}" + (f":{self.scale!r}" if self.scale != 1 else "")

    @property
    def can_exist(self) -> bool:
        """Whether it is on this disk, or may be on the hub."""
        if is_elsewhere(self.path):
            check_elsewhere(self.path)
            return "+" not in self.path
        path, within = split_key(self.path)
        return bool(within) or path.exists() or (not self.is_vector and hub.is_repository(self.path))


def split_key(text: str) -> tuple[Path, str]:
    """Split ``ckpt.pt:ema`` into the torch file and the keys under which it holds the weights; no keys where it isn't.

    A folder, which may be a training checkpoint, is split alike. A path of that very name goes first, so none is cut.
    """
    if names := split_names(text):
        text = names.rest
    whole = Path(text).expanduser()
    if not whole.exists():
        for pattern, is_there in ((KEYED, Path.is_file), (KEYED_FOLDER, Path.is_dir)):
            if (match := pattern.fullmatch(text)) and is_there(path := Path(match["path"]).expanduser()):
                return path, match["key"]
    return whole, ""


def is_one_file(reference: str) -> bool:
    """Return whether a reference is of one file, as a task vector is, not of a folder."""
    if is_elsewhere(reference):
        check_elsewhere(reference)
        return reference.endswith(SUFFIXES)
    return Path(reference).expanduser().is_file()


class Names(NamedTuple):
    """A checkpoint that is read under the names that transformers loads."""

    rest: str  # its own reference
    config: str  # the folder of the config and the tokenizer; empty for that beside the checkpoint


def split_names(text: str) -> Names | None:
    """Split ``hf:STEP`` or ``hf=CONFIG:STEP``; None for any other reference, and for a path of that very name."""
    match = None if is_elsewhere(text) else AS_TRANSFORMERS.fullmatch(text)
    return Names(match["rest"], match["config"] or "") if match and not Path(text).expanduser().exists() else None


def parse_addition(text: str) -> Addition:
    """Parse ``PATH``, ``PATH:SCALE``, ``vector:PATH`` or ``rebase:PATH``. Raises UsageError for too large a number."""
    rebase, is_vector = text.startswith(REBASE), text.startswith((VECTOR, REBASE))
    path = text.removeprefix(REBASE).removeprefix(VECTOR)
    match = None if Path(path).expanduser().exists() else SCALED.fullmatch(path)
    scale = float(match["scale"]) if match else 1.0
    if not math.isfinite(scale):
        raise UsageError(f"{text}: {scale} is too large a number.")
    return Addition(match["path"] if match else path, scale, rebase, is_vector)


def split_reference(reference: str) -> tuple[str, tuple[Addition, ...]]:
    """Split a reference into its base and what is added to it.

    Paths may have pluses of their own: the reference is cut so that base and additions can all be opened. Raises
    CheckpointError where no cut leaves such parts, or more than one does.
    """
    segments = reference.split("+")
    cuts = [_cut(segments)] if len(segments) > MOST_PLUSES else list(_cuts(segments))
    if len(segments) == 2:
        return cuts[0]
    sound = [(base, added) for base, added in cuts if all(part.can_exist for part in (Addition(base), *added))]
    if not sound:
        raise CheckpointError(f"{reference}: no such file or folder, and no BASE+ADAPTER of which both are there.")
    if len(sound) > 1:
        raise CheckpointError(
            f"{reference}: can be cut at several pluses into a base and what to add. Rename a folder, or link to it."
        )
    return sound[0]


def _cuts(segments: list[str]) -> Iterator[tuple[str, tuple[Addition, ...]]]:
    """Yield every way to cut at some of the pluses, one at least."""
    for joints in product("|+", repeat=len(segments) - 1):
        if "|" in joints:
            text = segments[0] + "".join(joint + part for joint, part in zip(joints, segments[1:], strict=True))
            yield _cut(text.split("|"))


def _cut(parts: list[str]) -> tuple[str, tuple[Addition, ...]]:
    return parts[0], tuple(parse_addition(part) for part in parts[1:])
