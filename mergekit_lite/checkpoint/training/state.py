"""What a training checkpoint holds, once it is put together from its pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_lite.checkpoint.encodings.tiled import Tile, Tiled, wrong_tiling
from mergekit_lite.checkpoint.formats.header import WeightFile
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError


@dataclass(frozen=True)
class State:
    """The weights of a training checkpoint.

    Attributes:
        files: the files that are read.
        tensors: the model's, by name, in the order of their bytes in the files.
        left_out: for all else that the folder holds, why it is left out.
        notes: what the user should know about the choice of the weights.
        nest: the keys that the tensors are under.
    """

    files: tuple[WeightFile, ...]
    tensors: Mapping[str, TensorSpec]
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()
    nest: tuple[str, ...] = ()


def joined(where: object, name: str, shape: tuple[int, ...], grid: tuple[int, ...], tiles: list[Tile]) -> TensorSpec:
    """Return a tensor made of pieces that tile ``grid``, which is its shape or its number of elements.

    Raises CheckpointError where the pieces leave a hole, overlap, leave the tensor or differ in their dtypes.
    """
    tiles = sorted((tile for tile in tiles if tile.spec.numel), key=lambda tile: tile.start) or tiles[:1]
    kinds = {tile.spec.dtype for tile in tiles}
    if len(kinds) > 1:
        raise CheckpointError(f"{where}: tensor {name!r}: its pieces are of {' and '.join(sorted(kinds))}.")
    if wrong := wrong_tiling(grid, [(tile.start, tile.spec.shape) for tile in tiles]):
        raise CheckpointError(
            f"{where}: tensor {name!r}: {wrong}. The checkpoint is incomplete, damaged or forged: copy it again, with "
            "the files of all processes."
        )
    first = tiles[0].spec
    if len(tiles) == 1:
        return replace(first, name=name, shape=shape)
    return TensorSpec(name, first.dtype, shape, first.file, first.offset, Tiled(grid, tuple(tiles)))


def in_file_order(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors in the order of their (first) bytes in the files."""
    return dict(sorted(tensors.items(), key=lambda item: (_natural(item[1].file), item[1].offset)))


def _natural(path: Path) -> tuple[int, str]:
    """Return what sorts ``__2_0`` before ``__10_0``."""
    return len(path.name), path.name
