"""Which files of a model folder hold its weights, and whether they may be opened.

Names follow the Hugging Face layout. A path in an index or a link in the folder is never followed out of it, save into
the blobs of the hub cache the folder itself belongs to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from mergekit_lite import input_files
from mergekit_lite.checkpoint.formats import FORMATS, SUFFIXES, Format, gguf
from mergekit_lite.errors import CheckpointError, listing

ADAPTER_CONFIG = "adapter_config.json"
INDEX_ENDING = ".index.json"
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt")  # other files of trainers
SHARD = re.compile(
    rf"(?P<stem>.+)-\d{{5}}-of-(?P<count>\d{{5}})(?P<suffix>(\.\w+)?({'|'.join(map(re.escape, SUFFIXES))}))"
)
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")  # weights of their own beside a model's
CONSOLIDATED = "consolidated."  # the same model once more, as Mistral's own programs read it
MAX_FILE_NAME = 255  # of every common file system


def weight_files(root: Path, part: str = "") -> tuple[list[Path], Mapping[str, str] | None]:
    """Return a folder's weight files in order of their names, and its index (tensor name → file name), if any.

    ``part`` is the folder in a model's folder, ``root``, if it isn't that itself. Raises CheckpointError where it has
    no weights, several candidates, a missing shard, or a path that leads out of the model's folder.
    """
    folder = root / part
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be read: {error.strerror}") from error
    names = weight_names(folder, present)
    index = None
    if names[0].endswith(INDEX_ENDING):
        index = weight_map(root, f"{part}/{names[0]}" if part else names[0])
        names = sorted(set(index.values()))
    if missing := [name for name in names if not (folder / name).exists()]:
        raise CheckpointError(listing(f"{folder}: these shards are missing; download them again", missing))
    return [inside(root, f"{part}/{name}" if part else name) for name in names], index


def parts_of(file: Path) -> list[Path]:
    """Return the files of a model of which one is named: all parts of a split GGUF, else the file alone."""
    shard = SHARD.fullmatch(file.name)
    if shard is None or shard["suffix"] not in gguf.SUFFIXES:
        return [file]
    names = shard_names(shard)
    if file.name not in names:
        return [file]
    if missing := [name for name in names if not (file.parent / name).exists()]:
        raise CheckpointError(listing(f"{file}: these parts are missing; download them again", missing))
    return [file.parent / name for name in names]


def weight_names(where: object, names: Collection[str]) -> list[str]:
    """Return which of these files hold a model's weights: one, an index, or a numbered set's shards, there or not.

    Raises CheckpointError where there are none, or it is not clear which are meant.
    """
    names = {name for name in names if name not in VALUE_HEADS} if value_head(names) else names
    for format in FORMATS:
        standard = [name for name in _standard_names(format) if name in names]
        if len(standard) > 1:
            raise CheckpointError(
                f"{where}: holds both {standard[0]} and {standard[1]}, and they may be different models. "
                "Remove the stale one, or name one file instead of the folder."
            )
        if standard:
            return standard
    return _unindexed(where, names)


def has_model(names: Collection[str]) -> bool:
    """Return whether one of these files is a model, or an index of its shards, by the standard names."""
    return any(name in names for format in FORMATS for name in _standard_names(format))


def value_head(names: Collection[str]) -> str | None:
    """Return which of these files holds a value head beside a model's weights; None where there is none."""
    present = [name for name in VALUE_HEADS if name in names]
    has_others = any(may_be_weights(name) or name.endswith(INDEX_ENDING) for name in names if name not in VALUE_HEADS)
    return present[0] if present and has_others else None


def value_head_file(root: Path, part: str = "") -> Path:
    """Return the path of the value head in a folder of a model's folder. Raises CheckpointError as ``inside``."""
    name = value_head({path.name for path in (root / part).iterdir()})
    return inside(root, f"{part}/{name}" if part else str(name))


def adapter_weights(where: object, names: Collection[str]) -> str:
    """Return the name of an adapter's weight file. Raises CheckpointError where these names are no adapter's."""
    if ADAPTER_CONFIG not in names:
        raise CheckpointError(
            f"{where}: is not an adapter: it has no {ADAPTER_CONFIG}. Name a folder that peft saved; of a tuned model, "
            "make a vector first: vector extract BASE TUNED -o v.safetensors"
        )
    possible = [name for format in FORMATS for name in format.ADAPTER_NAMES]
    present = [name for name in possible if name in names]
    if not present:
        raise CheckpointError(f"{where}: holds no {' or '.join(possible)}. Download the adapter again.")
    return present[0]


def is_adapter_alone(folder: Path) -> bool:
    """Return whether a folder holds a LoRA adapter and no model, whatever configs lie beside it."""
    names = {path.name for path in folder.iterdir()}
    own = {name for format in FORMATS for name in format.ADAPTER_NAMES}
    return ADAPTER_CONFIG in names and not any(may_be_weights(name) for name in names - own)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder. Raises CheckpointError where it is none, or a link that leads out."""
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
    """Return the path of a small file of a folder; None where nothing has the name.

    Raises CheckpointError where it may not be opened: see ``inside`` and ``input_files.opened``.
    """
    if not os.path.lexists(folder / name):
        return None
    path = inside(folder, name)
    with input_files.opened(path, input_files.MAX_BYTES):
        return path


def weight_map(folder: Path, index_name: str) -> dict[str, str]:
    """Read an index: tensor name → weight file of the folder. Raises CheckpointError where one could lead elsewhere."""
    weight_map = input_files.read_json(inside(folder, index_name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index_name}: has no weight_map. Download it again.")
    elsewhere = {name: target for name, target in weight_map.items() if not is_weight_name(target)}
    if elsewhere:
        lines = [f"{name!r} is said to be in {str(target)[:80]!r}" for name, target in elsewhere.items()]
        raise CheckpointError(
            listing(f"{folder / index_name}: names files that are not weight files of this folder", lines)
        )
    return weight_map


def is_weight_name(name: object) -> bool:
    """Return whether this is the bare name of a weight file: no folder in it, and safe to print and to create."""
    if not isinstance(name, str) or "/" in name or "\\" in name or not name.isprintable():
        return False
    return name.endswith(SUFFIXES) and len(name.encode()) <= MAX_FILE_NAME


def may_be_weights(name: str) -> bool:
    """Return whether a file may hold a model's weights, by its name."""
    return name.endswith(SUFFIXES) and name not in NOT_WEIGHTS


def _unindexed(where: object, names: Collection[str]) -> list[str]:
    """Find weight files under other than the standard names: one file, or a complete set of numbered shards."""
    for format in FORMATS:
        weights = sorted(name for name in names if name.endswith(format.SUFFIXES) and may_be_weights(name))
        if not weights:
            continue
        weights = [name for name in weights if not name.startswith(CONSOLIDATED)] or weights
        if shard := SHARD.fullmatch(weights[0]):
            numbered = shard_names(shard)
            if set(weights) <= set(numbered):
                return numbered
        elif len(weights) == 1:
            return weights
        raise CheckpointError(
            listing(f"{where}: has no model.safetensors and several weight files; name the one that is meant", weights)
        )
    standard = ", ".join(name for format in FORMATS for name in _standard_names(format))
    raise CheckpointError(f"{where}: holds no weights (looked for {standard}, or one {' / '.join(SUFFIXES)} file).")


def shard_names(shard: re.Match[str]) -> list[str]:
    """Return the names of all shards of a set of which one is named."""
    stem, count, suffix = shard["stem"], shard["count"], shard["suffix"]
    return [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]


def _standard_names(format: Format) -> list[str]:
    return [name + ending for name in format.MODEL_NAMES for ending in ("", INDEX_ENDING)]
