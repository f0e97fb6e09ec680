"""Folders of ``torch.distributed.checkpoint``, which FSDP2, torchtitan and Megatron (``torch_dist``) write.

    .metadata       a pickle: each tensor's dtype, shape and pieces, and each piece's file, offset and length there
    __R_N.distcp    pieces one after another, each a file of ``torch.save`` with one tensor

See ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py`` in https://github.com/pytorch/pytorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint.encodings.tiled import Tile
from mergekit_lite.checkpoint.formats import plain_pickle
from mergekit_lite.checkpoint.formats.header import WeightFile, check_name
from mergekit_lite.checkpoint.formats.plain_pickle import Key, Rebuilt, StoredTensor, Unknown
from mergekit_lite.checkpoint.formats.state_dict import OPTIMIZER, Extent, find_state
from mergekit_lite.checkpoint.formats.torch_zip import is_within, records_within, spec_in_record
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.checkpoint.training.state import State, in_file_order, joined
from mergekit_lite.errors import CheckpointError, shortened
from mergekit_lite.input_files import opened

METADATA = ".metadata"
MAX_METADATA_BYTES = 2_000_000_000  # of 100,000 pieces it has some 20 MB
CONVERT = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt"
_KINDS: Mapping[str, Any] = {
    "Metadata": Rebuilt, "TensorStorageMetadata": Rebuilt, "BytesStorageMetadata": Rebuilt,
    "ChunkStorageMetadata": Rebuilt, "TensorProperties": Rebuilt, "StorageMeta": Rebuilt, "_StorageInfo": Rebuilt,
    "_StoragePrefix": Rebuilt, "MetadataIndex": Key,
    "_MEM_FORMAT_ENCODING": Unknown, "MEM_FORMAT_ENCODING": Unknown,
}  # fmt: skip
_MODULES = (
    "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
)  # fmt: skip
KNOWN: plain_pickle.Known = {
    **{(module, name): kind for module in _MODULES for name, kind in _KINDS.items()},
    ("torch.serialization", "_get_layout"): Unknown,
    ("builtins", "getattr"): Unknown,  # how some versions of Python pickle an enumeration's member
    **{("pathlib", name): Unknown for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    **{("pathlib._local", name): Unknown for name in ("Path", "PosixPath", "WindowsPath")},
}


class Place(NamedTuple):
    """Where a piece is stored: a file of the folder, and a part of it."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor as the metadata describe it."""

    key: str  # its name among all that was saved
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # where each piece begins, and its shape


def read_distributed(folder: Path, within: str = "") -> State:
    """Find every tensor of a model in such a folder, or of what it holds under the keys ``within``.

    Only the metadata and the header of each piece are read.

    Raises:
        CheckpointError: damaged, forged or incomplete, or without one clear set of weights.
    """
    path = folders.inside(folder, METADATA)
    with opened(path, MAX_METADATA_BYTES) as file:
        content = file.read()
    metadata = plain_pickle.load(path, content, KNOWN)
    entries = metadata.get("state_dict_metadata") if isinstance(metadata, Rebuilt) else None
    if not isinstance(metadata, Rebuilt) or not isinstance(entries, dict):
        raise CheckpointError(f"{path}: holds no metadata of torch.distributed.checkpoint. Copy the folder again.")
    tree = _tree(path, entries, metadata.get("planner_data"))
    found = find_state(folder, tree, within, _extent)
    if not found.tensors:
        raise CheckpointError(f"{folder}: holds no tensors of a model. Name the folder of the model's checkpoint.")
    left_out = dict.fromkeys(found.others, "not a tensor of the model's state")
    reformed = metadata.get("mcore_data")
    for stored in found.tensors.values():
        if isinstance(reformed, dict) and stored.key in reformed:
            raise CheckpointError(
                f"{folder}: tensor {stored.key!r} was saved by Megatron as runs of its optimizer, not as a weight. "
                "Save the model with --ckpt-format torch_dist."
            )
    with _Pieces(folder, _places(path, metadata.get("storage_data"))) as pieces:
        tensors = {name: pieces.joined(name, stored) for name, stored in found.tensors.items()}
        files = (WeightFile.identify(path, content), *pieces.files())
    return State(files, in_file_order(tensors), left_out, nest=found.nest)


def _extent(value: object) -> Extent | None:
    return Extent(value.shape, dtypes.is_float(value.dtype)) if isinstance(value, Stored) else None


def _tree(path: Path, entries: Mapping[Any, Any], planned: object) -> dict[str, Any]:
    """Return what was saved as nested dictionaries, with a ``Stored`` for each tensor and None for anything else."""
    tree: dict[str, Any] = {}
    places = planned if isinstance(planned, dict) else {}
    for key, entry in entries.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: a key is no text. The file is damaged or forged.")
        check_name(path, key)
        *above, name = _path(key, places.get(key))
        level = tree
        for part in above:
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                raise CheckpointError(f"{path}: {key!r} lies within a tensor. The file is damaged or forged.")
        if name in level:
            raise CheckpointError(f"{path}: {key!r} has the place of another one. The file is damaged or forged.")
        is_tensor = isinstance(entry, Rebuilt) and entry.get("chunks") is not None
        level[name] = _stored(path, key, entry) if is_tensor else None
    return tree


def _path(key: str, planned: object) -> Sequence[str]:
    """Return the keys under which a tensor was in the state that was saved, its own name last.

    Megatron doesn't note them; there the optimizer's are known by how their names begin.
    """
    if isinstance(planned, tuple | list) and all(isinstance(part, str | int) for part in planned):
        parts = [str(part) for part in planned]
        if ".".join(parts) == key:
            return parts
    match = OPTIMIZER.match(key)
    first, _, rest = key[match.start("key") :].partition(".") if match else ("", "", "")
    return (first, rest) if rest else (key,)


def _stored(path: Path, key: str, entry: Rebuilt) -> Stored:
    """Return a tensor of the metadata, once dtype, shape and pieces are what they should be."""
    properties, shape, chunks = entry.get("properties"), entry.get("size"), entry.get("chunks")
    state = properties.state if isinstance(properties, Rebuilt) else None
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    listed = chunks if isinstance(chunks, list | tuple) else []
    blocks = [(chunk.get("offsets"), chunk.get("sizes")) for chunk in listed if isinstance(chunk, Rebuilt)]
    sound = isinstance(dtype, str) and dtype in dtypes.BY_NAME
    if not sound or not _is_shape(shape) or not all(_is_shape(part) for block in blocks for part in block):
        raise CheckpointError(
            f"{path}: tensor {key!r} has dtype {shortened(ascii(dtype), 80)} and shape {shortened(ascii(shape), 80)}, "
            "or pieces without a place. The file is damaged or forged, or the dtype isn't supported."
        )
    return Stored(key, str(dtype), tuple(shape), tuple(dict.fromkeys(blocks)))


def _is_shape(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) > 16:
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in value) and math.prod(value) < 1 << 63


def _places(path: Path, storage: object) -> dict[tuple[str, tuple[int, ...]], Place]:
    """Return where each piece is stored, by its tensor's key and its place in the tensor."""
    places: dict[tuple[str, tuple[int, ...]], Place] = {}
    for key, info in storage.items() if isinstance(storage, dict) else ():
        if not isinstance(key, Key) or not isinstance(info, Rebuilt):
            continue
        name, start = key.get("fqn"), key.get("offset")
        file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{path}: {shortened(ascii(name), 80)} was compressed while it was saved, which isn't read. Put it "
                f"together first: {CONVERT}"
            )
        if not isinstance(file, str) or type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise CheckpointError(f"{path}: {shortened(ascii(name), 80)} has no place. The file is damaged or forged.")
        if isinstance(name, str) and _is_shape(start):
            places[name, start] = Place(file, offset, length)
    return places


class _Pieces:
    """The files of pieces of a folder, open while their headers are read."""

    def __init__(self, folder: Path, places: Mapping[tuple[str, tuple[int, ...]], Place]) -> None:
        self._folder = folder
        self._places = places
        self._files: dict[str, tuple[Path, IO[bytes], int]] = {}
        self._headers: dict[str, xxhash.xxh3_128] = {}
        self._taken: dict[str, list[tuple[int, int]]] = {}
        self._tensors: dict[bytes, object] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Pieces:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def joined(self, name: str, stored: Stored) -> TensorSpec:
        """Return a tensor, made of its pieces. Raises CheckpointError as ``read_distributed``."""
        tiles = [Tile(start, self._piece(stored, start, shape)) for start, shape in stored.chunks if 0 not in shape]
        if not tiles:
            start, shape = stored.chunks[0] if stored.chunks else ((), ())
            tiles = [Tile(start, self._piece(stored, start, shape))]
        return joined(self._folder, name, stored.shape, stored.shape, tiles)

    def files(self) -> Iterator[WeightFile]:
        """Yield the identity of each file, by its pieces' headers; raise CheckpointError where pieces overlap."""
        for name in sorted(self._files):
            path = self._files[name][0]
            end = 0
            for begin, length in sorted(self._taken[name]):
                if begin < end:
                    raise CheckpointError(f"{path}: two pieces overlap at byte {begin:,}. The checkpoint is forged.")
                end = begin + length
            yield WeightFile.identify(path, self._headers[name].digest())

    def _piece(self, stored: Stored, start: tuple[int, ...], shape: tuple[int, ...]) -> TensorSpec:
        """Return one piece, once its header says what the metadata say."""
        place = self._places.get((stored.key, start))
        if place is None:
            raise CheckpointError(
                f"{self._folder}: the piece of {stored.key!r} at {list(start)} is in no file. Copy the folder again."
            )
        path, file, size = self._open(place.file, stored.key)
        what = f"{path}: the piece of {stored.key!r} at byte {place.offset:,}"
        if place.offset + place.length > size:
            raise CheckpointError(
                f"{what} should end at {place.offset + place.length:,}, the file at {size:,}. It is cut short: copy "
                "the folder again."
            )
        try:
            pickled, records = records_within(file, place.offset, place.length, what)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged zip makes zipfile raise nearly anything
            raise CheckpointError(f"{what} is no file of torch.save. Copy the folder again.") from error
        if pickled not in self._tensors:  # pieces of one shape have equal pickles
            self._tensors[pickled] = plain_pickle.load(what, pickled, {})
        tensor = self._tensors[pickled]
        if not isinstance(tensor, StoredTensor) or (tensor.dtype, tensor.shape) != (stored.dtype, shape):
            kind = f"{tensor.dtype}, {list(tensor.shape)}" if isinstance(tensor, StoredTensor) else "no tensor"
            raise CheckpointError(
                f"{what} is {kind}; the metadata say {stored.dtype}, {list(shape)}. The checkpoint is damaged or "
                "forged."
            )
        record = records.get(f"data/{tensor.record}")
        if record is None or not is_within(records, place.offset, place.length):
            raise CheckpointError(f"{what} has no data, or they lie elsewhere. The checkpoint is damaged or forged.")
        self._headers[place.file].update(pickled)
        self._taken[place.file].append((place.offset, place.length))
        return spec_in_record(path, stored.key, tensor.dtype, tensor.shape, tensor.strides, tensor.start, record)

    def _open(self, name: str, key: str) -> tuple[Path, IO[bytes], int]:
        """Return a file by its name in the metadata, open, with its size; it has to be in the folder."""
        if name not in self._files:
            if "/" in name or "\\" in name or not name.isprintable() or name in ("", ".", ".."):
                raise CheckpointError(
                    f"{self._folder / METADATA}: {key!r} is said to be in {shortened(ascii(name), 80)}, which is no "
                    "file of this folder. The file is damaged or forged."
                )
            if not (self._folder / name).exists():
                raise CheckpointError(f"{self._folder / name}: is missing. Copy the files of all processes.")
            path = folders.inside(self._folder, name)
            file = self._stack.enter_context(opened(path))
            self._files[name] = path, file, path.stat().st_size
            self._headers[name] = xxhash.xxh3_128()
            self._taken[name] = []
        return self._files[name]
