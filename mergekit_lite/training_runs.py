"""The checkpoints of a training run: found by a pattern or in the run's folder, ordered by the steps in their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import glob, has_magic
from itertools import pairwise
from pathlib import Path

from mergekit_lite.errors import UsageError, listing
from mergekit_lite.options import finite_number

WORDS = r"global_step|step|iteration|iter|checkpoint|ckpt|epoch"
STEP = re.compile(rf"({WORDS})[-_=]?(\d+)(?!.*(?:{WORDS})[-_=]?\d)", re.IGNORECASE)
READ_AS = re.compile(r"hf(?:=[^:]*)?:")  # how its checkpoints are read


def steps_of(checkpoints: Sequence[str]) -> list[int]:
    """Return the step in each checkpoint's name: ``run/step-75``, ``checkpoint-500``, ``global_step75/actor``.

    The name is the last part of the path, or the one before it.

    Raises:
        UsageError: some name has none, or they count different things; the message says what to give instead.
    """
    found = [_named(checkpoint) for checkpoint in checkpoints]
    if without := [each for each, named in zip(checkpoints, found, strict=True) if named is None]:
        raise UsageError(listing("These names don't tell a step: give the steps, 25,50,75", without))
    named = [each for each in found if each is not None]
    if len({word for word, _ in named}) > 1:
        told = [f"{each}: {word} {step}" for each, (word, step) in zip(checkpoints, named, strict=True)]
        raise UsageError(listing("These names count different things: give the steps, 25,50,75", told))
    return [step for _, step in named]


def checkpoints_of(run: str) -> list[str]:
    """Return a run's checkpoints by their steps, the first one first.

    Args:
        run: a pattern, ``run/step-*``, or a folder that holds the checkpoints; with ``hf:`` or ``hf=FOLDER:`` before it
            where they are to be read so.

    Raises:
        UsageError: there is none, or the steps are not clear.
    """
    read_as = match[0] if (match := READ_AS.match(run)) else ""
    place = Path(run[len(read_as) :]).expanduser()
    if has_magic(str(place)) and not place.exists():
        found = glob(str(place))  # noqa: PTH207  (Path.glob takes no pattern that begins at the root)
    elif place.is_dir():
        root = place.resolve()
        steps = [path for path in place.iterdir() if STEP.fullmatch(path.name)]
        found = [str(path) for path in steps if path.resolve().is_relative_to(root)]
    else:
        raise UsageError(f"{run}: is no folder, and no pattern such as run/step-* (of paths on this machine).")
    if not found:
        what = "matches no file or folder" if has_magic(str(place)) else "holds no checkpoints, such as step-500"
        raise UsageError(f"{run}: {what}.")
    found.sort()
    ordered = sorted(zip(steps_of(found), found, strict=True))
    if twice := [f"{a} and {b}" for (one, a), (other, b) in pairwise(ordered) if one == other]:
        raise UsageError(listing(f"{run}: has checkpoints of the same step", twice))
    return [read_as + path for _, path in ordered]


def run_of(
    checkpoints: str | Path | Sequence[str | Path], steps: Sequence[float] = ()
) -> tuple[list[str], list[float]]:
    """Return a run's checkpoints and their steps.

    Args:
        checkpoints: of it; or the folder that holds them, or a pattern.
        steps: one for each, in their order; by default those in their names.

    Raises:
        UsageError: the steps are not clear, or there are more or fewer than checkpoints.
    """
    models = checkpoints_of(str(checkpoints)) if isinstance(checkpoints, str | Path) else list(map(str, checkpoints))
    at = [finite_number(value, "steps") for value in steps or steps_of(models)]
    if len(at) != len(models):
        raise UsageError(f"Expected a step for each of the {len(models)} checkpoints, got {len(at)}.")
    return models, at


def _named(checkpoint: str) -> tuple[str, int] | None:
    """Return the word and the number of a checkpoint's step; None where there is none."""
    for part in [part for part in re.split(r"[/\\]", checkpoint) if part][:-3:-1]:
        if match := STEP.search(part):
            return match[1].lower(), int(match[2])
    return None
