"""References that are sums: ``BASE+ADAPTER``, ``BASE+v.safetensors:0.5+./adapter:-0.3``.

What is added is a task vector (a file) or a LoRA adapter (a folder or a hub repository), with ``:NUMBER`` behind it to
scale it. ``vector:`` before it says what it is and may be left out; ``rebase:`` adds a vector to another base than the
one it was made from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from mergekit_lite.errors import CheckpointError, UsageError

VECTOR, REBASE = "vector:", "rebase:"
SCALED = re.compile(r"(?P<path>.+):(?P<scale>-?(\d+\.?\d*|\.\d+)([eE]-?\d+)?)")
MOST_PLUSES = 12


class Addend(NamedTuple):
    """One thing to add: the path or repository, what to multiply it by, and whether any base will do."""

    path: str
    scale: float = 1.0
    rebase: bool = False
    is_vector: bool = False

    def __str__(self) -> str:
        prefix = REBASE if self.rebase else VECTOR if self.is_vector else ""
        return f"{prefix}{self.path}" + (f":{self.scale!r}" if self.scale != 1 else "")

    @property
    def is_there(self) -> bool:
        """Whether it is on this disk, or may be on the hub."""
        from mergekit_lite.checkpoint import hub

        return Path(self.path).expanduser().exists() or (not self.is_vector and hub.is_repository(self.path))


def addend(text: str) -> Addend:
    """Read one addend. Raises UsageError where its number is too large."""
    rebase, is_vector = text.startswith(REBASE), text.startswith((VECTOR, REBASE))
    path = text.removeprefix(REBASE).removeprefix(VECTOR)
    found = None if Path(path).expanduser().exists() else SCALED.fullmatch(path)
    scale = float(found["scale"]) if found else 1.0
    if not math.isfinite(scale):
        raise UsageError(f"{text}: {scale} is too large a number.")
    return Addend(found["path"] if found else path, scale, rebase, is_vector)


def names_vector(reference: str) -> bool:
    """Whether a reference is a task vector without a base."""
    return reference.startswith((VECTOR, REBASE))


def parted(reference: str) -> tuple[str, tuple[Addend, ...]]:
    """Base and addends. Where paths have pluses of their own, the cut that leaves things which can be opened.

    Raises:
        CheckpointError: no cut, or more than one, does.
    """
    segments = reference.split("+")
    cuts = [_cut(segments)] if len(segments) > MOST_PLUSES else list(_cuts(segments))
    sound = [(base, added) for base, added in cuts if _can_be_base(base) and all(one.is_there for one in added)]
    if len(segments) == 2:
        return cuts[0]
    if not sound:
        raise CheckpointError(f"{reference}: no such file or folder, and no BASE+ADAPTER of which both are there.")
    if len(sound) > 1:
        raise CheckpointError(
            f"{reference}: can be cut at several pluses into a base and what to add. Rename a folder, or link to it."
        )
    return sound[0]


def _can_be_base(text: str) -> bool:
    from mergekit_lite.checkpoint import hub

    return Path(text).expanduser().exists() or hub.is_repository(text)


def _cuts(segments: list[str]) -> Iterator[tuple[str, tuple[Addend, ...]]]:
    """Every way to cut at some of the pluses, one at least."""
    for joints in product("|+", repeat=len(segments) - 1):
        if "|" in joints:
            text = segments[0] + "".join(joint + part for joint, part in zip(joints, segments[1:], strict=True))
            yield _cut(text.split("|"))


def _cut(parts: list[str]) -> tuple[str, tuple[Addend, ...]]:
    return parts[0], tuple(addend(part) for part in parts[1:])
