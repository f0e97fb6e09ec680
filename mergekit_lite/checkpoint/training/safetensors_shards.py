"""Folders in which ``torch.distributed.checkpoint`` put each process's pieces into a safetensors file of its own.

    shard-0000R-model-0000N-of-0000M.safetensors    pieces under their tensors' names; their places in the metadata

``HuggingFaceStorageWriter(save_distributed=True)`` writes them, see ``torch/distributed/checkpoint/hf_storage.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint.encodings.tiled import Tile
from mergekit_lite.checkpoint.formats import safetensors
from mergekit_lite.checkpoint.formats.header import Header
from mergekit_lite.checkpoint.training.state import State, in_file_order, joined
from mergekit_lite.errors import CheckpointError
from mergekit_lite.input_files import parse_json

SHARD = re.compile(r"shard-(?P<process>\d{5})-model-\d{5}-of-(?P<files>\d{5})\.safetensors")
PLACES = "DCP_SHARDING_INFO"


def read_shards(folder: Path, names: set[str]) -> State:
    """Put a model together from such files. Raises CheckpointError where pieces are missing, damaged or overlap."""
    shards = {name: match for name in sorted(names) if (match := SHARD.fullmatch(name))}
    processes = {int(match["process"]) for match in shards.values()}
    if missing := set(range(1, max(processes) + 1)) - processes:
        raise CheckpointError(f"{folder}: the shards of process {min(missing)} are missing. Copy all of them.")
    tiles: dict[str, list[Tile]] = {}
    headers = [safetensors.read_header(folders.inside(folder, name)) for name in shards]
    for header in headers:
        places = _places(header)
        for name, spec in header.tensors.items():
            start = places.get(name)
            if start is None or len(start) != len(spec.shape):
                raise CheckpointError(f"{header.file.path}: doesn't say where in {name!r} its piece lies.")
            tiles.setdefault(name, []).append(Tile(start, spec))
    tensors = {}
    for name, of_name in tiles.items():
        # The shape of the whole isn't stored: it is as long as the pieces reach.
        ends = [[low + length for low, length in zip(tile.start, tile.spec.shape, strict=True)] for tile in of_name]
        if len({len(end) for end in ends}) > 1:
            raise CheckpointError(f"{folder}: the pieces of {name!r} have different numbers of dimensions.")
        shape = tuple(map(max, zip(*ends, strict=True)))
        tensors[name] = joined(folder, name, shape, shape, of_name)
    note = f"the files don't say how many processes wrote them; those of {len(processes)} are here"
    return State(tuple(header.file for header in headers), in_file_order(tensors), {}, (note,))


def check_whole(header: Header) -> None:
    """Raise CheckpointError where a file holds one process's pieces: alone they look like tensors."""
    if PLACES in header.metadata and SHARD.fullmatch(header.file.path.name):
        raise CheckpointError(
            f"{header.file.path}: holds one process's pieces of tensors. Name its folder, {header.file.path.parent}"
        )


def _places(header: Header) -> Mapping[str, tuple[int, ...]]:
    """Return where in its tensor each piece begins, as a file's metadata say."""
    try:
        content = parse_json(header.metadata.get(PLACES, ""))
        places = {name: tuple(entry["saved_offsets"]) for name, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{header.file.path}: has no {PLACES} that can be read. Copy it again.") from error
    if not all(type(at) is int and at >= 0 for place in places.values() for at in place):
        raise CheckpointError(f"{header.file.path}: its {PLACES} is damaged or forged. Copy it again.")
    return places
