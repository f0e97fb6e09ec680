"""Which files of a model folder hold its weights, and whether they may be opened.

Names follow the Hugging Face layout. A path in an index or a link in the folder is never followed out of it, save into the blobs
of the hub cache the folder itself belongs to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.errors import CheckpointError, listing

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin|\.pt|\.pth)")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: should hold a JSON object, but holds a {type(content).__name__}.")
    return content


def weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """Find the weight files of a folder.

    Returns:
        The files in order of their names, and the index (tensor name → file name) where the folder has one.

    Raises:
        CheckpointError: no weights, more than one candidate, a shard that is missing, or a path that leaves the folder.
    """
    standard = [name for name in STANDARD if (folder / name).exists()]
    safetensors = [name for name in standard if "safetensors" in name]
    chosen = safetensors or standard
    if len(chosen) > 1:
        raise CheckpointError(
            f"{folder}: holds both {chosen[0]} and {chosen[1]}, and they may be different models. "
            "Remove the stale one, or name one file instead of the folder."
        )
    if chosen and chosen[0].endswith(".index.json"):
        index = _weight_map(folder, chosen[0])
        names = sorted(set(index.values()))
    else:
        index = None
        names = chosen or _unindexed(folder)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(listing(f"{folder}: these shards are missing; download them again", missing))
    return [inside(folder, name) for name in names], index


def inside(folder: Path, name: str) -> Path:
    """The path of a file in ``folder``, or CheckpointError where a link leads out of it."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    target = (root / name).resolve()
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise CheckpointError(
            f"{folder / name}: is a link that leaves its folder, to {target}. Refused: put the file itself there."
        )
    return root / name


def _weight_map(folder: Path, index_name: str) -> dict[str, str]:
    weight_map = read_json(inside(folder, index_name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index_name}: has no weight_map. Download it again.")
    bad = [
        f"{name!r} is said to be in {target!r}"
        for name, target in weight_map.items()
        if not isinstance(target, str) or Path(target).name != target or not target.endswith(WEIGHT_SUFFIXES)
    ]
    if bad:
        raise CheckpointError(
            listing(f"{folder / index_name}: names files that are not weight files of this folder", bad)
        )
    return weight_map


def _unindexed(folder: Path) -> list[str]:
    """Weight files under other than the standard names: one file, or a complete set of numbered shards."""
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        names = sorted(
            path.name for path in folder.iterdir() if path.suffix in suffixes and path.name != "training_args.bin"
        )
        if not names:
            continue
        shards = [SHARD.fullmatch(name) for name in names]
        if len(names) == 1 and shards[0] is None:
            return names
        sets = {(shard["stem"], shard["count"], shard["suffix"]) for shard in shards if shard}
        if all(shards) and len(sets) == 1:
            stem, count, suffix = sets.pop()
            return [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
        raise CheckpointError(
            listing(
                f"{folder}: has no model.safetensors and several weight files; name the one that is meant",
                names,
            )
        )
    raise CheckpointError(
        f"{folder}: holds no weights (looked for {', '.join(STANDARD)}, or one {' / '.join(WEIGHT_SUFFIXES)} file)."
    )
