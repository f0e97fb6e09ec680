"""Which files of a model folder hold its weights, and whether they may be opened.

Names follow the Hugging Face layout. A path in an index or a link in the folder is never followed out of it, save into
the blobs of the hub cache the folder itself belongs to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
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
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
INDEX_ENDING = ".index.json"
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt")  # what trainers leave beside them
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin|\.pt|\.pth)")
MAX_JSON_BYTES = 100_000_000  # an index of a million tensors is no larger
MAX_SMALL_BYTES = 100_000_000  # of what travels beside weights: tokenizers come to some tens of megabytes
MAX_FILE_NAME = 255  # of every common file system


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError where there is none."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is {size:,} bytes long; more than {MAX_JSON_BYTES:,} of JSON is refused.")
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
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be read: {error.strerror}") from error
    names = weight_names(folder, present)
    index = None
    if names[0].endswith(INDEX_ENDING):
        index = weight_map(folder, names[0])
        names = sorted(set(index.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(listing(f"{folder}: these shards are missing; download them again", missing))
    return [inside(folder, name) for name in names], index


def weight_names(where: object, names: Collection[str]) -> list[str]:
    """Which of a folder's or a repository's files are its weights.

    Returns:
        One file, an index (``….index.json``, which names the files), or all shards of a numbered set, there or not.

    Raises:
        CheckpointError: there are none, or it is not clear which are meant.
    """
    standard = [name for name in STANDARD if name in names]
    chosen = [name for name in standard if "safetensors" in name] or standard
    if len(chosen) > 1:
        raise CheckpointError(
            f"{where}: holds both {chosen[0]} and {chosen[1]}, and they may be different models. "
            "Remove the stale one, or name one file instead of the folder."
        )
    return chosen or _unindexed(where, names)


def adapter_weights(where: object, names: Collection[str]) -> str:
    """The weight file of an adapter's folder or repository. Raises CheckpointError where there is none."""
    if ADAPTER_CONFIG not in names:
        raise CheckpointError(
            f"{where}: is not an adapter: it has no {ADAPTER_CONFIG}. Name a folder that peft saved; of a tuned model, "
            "make a vector first: vector extract BASE TUNED -o v.safetensors"
        )
    found = [name for name in ADAPTER_WEIGHTS if name in names]
    if not found:
        raise CheckpointError(f"{where}: holds no {' or '.join(ADAPTER_WEIGHTS)}. Download the adapter again.")
    return found[0]


def inside(folder: Path, name: str) -> Path:
    """The path of a file in ``folder``. Raises CheckpointError where a link leads out of it or to no regular file."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    target = (root / name).resolve()
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise CheckpointError(
            f"{folder / name}: is a link that leaves its folder, to {target}. Refused: put the file itself there."
        )
    if not target.is_file():
        raise CheckpointError(f"{folder / name}: is not a regular file.")
    return root / name


def small_file(folder: Path, name: str) -> Path | None:
    """Return the path of a file that lies beside a model's weights, to be read whole; None where there is none.

    Raises CheckpointError where a link leads out of the folder, or the file is larger than ``MAX_SMALL_BYTES``.
    """
    if not (folder / name).is_file():
        return None
    path = inside(folder, name)
    if (size := path.stat().st_size) > MAX_SMALL_BYTES:
        raise CheckpointError(f"{folder / name}: is {size:,} bytes long; more than {MAX_SMALL_BYTES:,} is refused.")
    return path


def weight_map(folder: Path, index_name: str) -> dict[str, str]:
    """The index of a sharded checkpoint: tensor name → name of a file in the same folder, checked to be just that."""
    weight_map = read_json(inside(folder, index_name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index_name}: has no weight_map. Download it again.")
    bad = [
        f"{name!r} is said to be in {str(target)[:80]!r}"
        for name, target in weight_map.items()
        if not is_weight_name(target)
    ]
    if bad:
        raise CheckpointError(
            listing(f"{folder / index_name}: names files that are not weight files of this folder", bad)
        )
    return weight_map


def is_weight_name(name: object) -> bool:
    """Whether this is the bare name of a weight file: no folder, nothing a terminal or file system would trip over."""
    if not isinstance(name, str) or "/" in name or "\\" in name or not name.isprintable():
        return False
    return name.endswith(WEIGHT_SUFFIXES) and len(name.encode()) <= MAX_FILE_NAME


def _unindexed(where: object, names: Collection[str]) -> list[str]:
    """Weight files under other than the standard names: one file, or a complete set of numbered shards."""
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        found = sorted(name for name in names if name.endswith(suffixes) and name not in NOT_WEIGHTS)
        if not found:
            continue
        shard = SHARD.fullmatch(found[0])
        if shard is None and len(found) == 1:
            return found
        if shard is not None:
            count, stem, suffix = shard["count"], shard["stem"], shard["suffix"]
            numbered = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
            if set(found) <= set(numbered):
                return numbered
        raise CheckpointError(
            listing(f"{where}: has no model.safetensors and several weight files; name the one that is meant", found)
        )
    looked_for = f"looked for {', '.join(STANDARD)}, or one {' / '.join(WEIGHT_SUFFIXES)} file"
    gguf = " It holds GGUF files, which aren't read." if any(name.endswith(".gguf") for name in names) else ""
    raise CheckpointError(f"{where}: holds no weights ({looked_for}).{gguf}")
