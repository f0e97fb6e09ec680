"""Layout of the output: where every byte will lie, computed before any weight is read.

A safetensors header holds only names, dtypes, shapes and offsets, so it can be written first and the data in any order.
A torch file is a zip whose records torch itself can lay out without their contents.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import formats
from mergekit_lite.checkpoint.folder import INDEX_ENDING, SHARD
from mergekit_lite.checkpoint.formats import safetensors
from mergekit_lite.checkpoint.parts import MODEL, in_folder
from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.object_stores import Place, is_url, parse_place
from mergekit_lite.plain_text import NOT_PLAIN, is_plain_line

ALIGNMENT = 8  # bytes; of the data in a safetensors file
FILE = 1 << 48  # bytes; no file has so many
OutputPath: TypeAlias = "Path | Place"  # on a disk, or in an object store


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of data."""
        return self.numel * dtypes.size(self.dtype)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of the output: its path, the bytes before the data, its size, and its tensors in order.

    Where it lies in a folder, the names of its tensors begin with that, and are stored without it.
    """

    name: str
    header: bytes
    size: int
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """All files of one output, and each tensor's place.

    A place is one number, ``file_number * FILE + byte offset``: pairs would take three times the memory, and there are
    very many tensors. ``nest`` is for torch files only: the keys that its tensors are nested under.
    """

    files: tuple[OutputFile, ...]
    places: dict[str, int]
    nest: tuple[str, ...] | None = None

    def place(self, tensor: str) -> tuple[int, int]:
        """Return the number of a tensor's file, and the tensor's first byte in it."""
        return divmod(self.places[tensor], FILE)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all files."""
        return sum(file.size for file in self.files)


def shard_names(number: int, folder: str = "", stem: str = MODEL) -> list[str]:
    """Return the names of a part's files, as transformers and diffusers look for them.

    >>> shard_names(1), shard_names(2, "unet")
    (['model.safetensors'], ['unet/model-00001-of-00002.safetensors', 'unet/model-00002-of-00002.safetensors'])
    """
    numbered = [f"{stem}-{shard:05d}-of-{number:05d}.safetensors" for shard in range(1, number + 1)]
    return [in_folder(folder, name) for name in (numbered if number > 1 else [f"{stem}.safetensors"])]


def safetensors_layout(
    groups: Sequence[Sequence[OutputTensor]], names: Sequence[str], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Lay out safetensors files, one for each group of tensors; wider dtypes go to the front, so that all stay aligned.

    ``names`` are the files' paths in the output; ``metadata`` is text by key for the header.
    """
    files: list[OutputFile] = []
    places: dict[str, int] = {}
    for number, (group, name) in enumerate(zip(groups, names, strict=True)):
        tensors = tuple(sorted(group, key=lambda tensor: -dtypes.size(tensor.dtype)))
        text = f"{{{','.join(_header_members(tensors, folder_of(name), metadata or {}))}}}".encode()
        text += b" " * (-len(text) % ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        offset = len(header)
        for tensor in tensors:
            places[tensor.name] = number * FILE + offset
            offset += tensor.nbytes
        files.append(OutputFile(name, header, offset, tensors))
    return Layout(tuple(files), places)


def folder_of(file: str) -> str:
    """Return the folder that a file of an output lies in, by its path; empty for the output's own."""
    return file.rpartition("/")[0]


def _header_members(tensors: Sequence[OutputTensor], folder: str, metadata: Mapping[str, str]) -> Iterator[str]:
    """Yield each member of the header of a file in a folder as text."""
    path = in_folder(folder, "")
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    yield f'"__metadata__":{encode({"format": "pt", **metadata})}'
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        name, code, shape = tensor.name.removeprefix(path), dtypes.BY_NAME[tensor.dtype].code, list(tensor.shape)
        yield f'{encode(name)}:{{"dtype":"{code}","shape":{encode(shape)},"data_offsets":[{begin},{end}]}}'


def file_layout(tensors: Sequence[OutputTensor], name: str, nest: tuple[str, ...]) -> Layout:
    """Lay out a single file, in the format that its name ends with.

    ``nest`` are the keys to nest a torch file's tensors under. torch writes such a file once without data, as a sparse
    temporary file whose records show where the data belong. Raises RunError where there is no room for that.
    """
    if Path(name).suffix in safetensors.SUFFIXES:
        return safetensors_layout([tensors], [name])
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "skeleton.pt")
            with path.open("wb") as file:
                write_torch_skeleton(file, tensors, nest)
            specs = formats.read_header(path).tensors
            size = path.stat().st_size
    except OSError as error:
        raise RunError(
            f"{error.filename or tempfile.gettempdir()}: can't be written, and a torch file is laid out there: "
            f"{error.strerror}. Make room, or set TMPDIR to another folder."
        ) from error
    places = {spec.name: spec.offset for spec in specs.values()}
    return Layout((OutputFile(name, b"", size, tuple(tensors)),), places, nest)


def output_path(output: str | Path | Place) -> OutputPath:
    """Return where an output goes: a path, or for the URL of an object store its place.

    Raises UsageError where it has a name that nobody can print, or that of a format which is only read.
    """
    if isinstance(output, str) and is_url(output):
        path: OutputPath = parse_place(output)
    else:
        path = output if isinstance(output, Place) else Path(output).expanduser()
    if not is_plain_line(path.name):
        raise UsageError(f"{str(output)!a}: {NOT_PLAIN}. Choose another.")
    if path.suffix in formats.gguf.SUFFIXES:
        raise UsageError(
            f"{output}: GGUF is read, but not written. Name a folder, and convert that with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    return path


def is_single_file(output: OutputPath) -> bool:
    """Return whether an output path names one file rather than a folder."""
    return formats.is_written(output)


def write_torch_skeleton(file: IO[bytes], tensors: Sequence[OutputTensor], nest: tuple[str, ...]) -> None:
    """Write a torch file without the tensors' data. Raises OSError.

    torch names the folder inside of the file after the path it is given. It is given none, for which that name is
    always ``archive``: so no byte depends on the output's name.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        content: dict[str, object] = {
            tensor.name: torch.empty(tensor.shape, dtype=dtypes.torch_dtype(tensor.dtype)) for tensor in tensors
        }
    for key in reversed(nest):
        content = {key: content}
    skeleton = _Skeleton()
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(content, skeleton)  # type: ignore[arg-type]
    for position, data in skeleton.pieces:
        file.seek(position)
        file.write(data)


class _Skeleton:
    """A file for torch to write to, which keeps what is written; torch skips the data with ``seek``.

    torch turns errors of a real file into its own, which don't say what happened.
    """

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytearray]] = []  # where each starts, in the order in which they were written
        self._position = 0

    def write(self, data: bytes) -> int:
        if not self.pieces or self._position != self.pieces[-1][0] + len(self.pieces[-1][1]):
            self.pieces.append((self._position, bytearray()))
        self.pieces[-1][1].extend(data)
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Do nothing: all is kept already."""


def grouped_by_size(tensors: Sequence[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    """Cut the sequence of tensors into groups of at most ``limit`` bytes; a larger tensor is a group of its own."""
    groups: list[list[OutputTensor]] = []
    room = -1
    for tensor in tensors:
        if tensor.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return groups


def indexed_files(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the indexes that go with an output's files: the path of each, and those of the shards that it lists."""
    indexes: dict[str, list[str]] = {}
    for name in names:
        if shard := SHARD.fullmatch(name):
            indexes.setdefault(f"{shard['stem']}{shard['suffix']}{INDEX_ENDING}", []).append(name)
    return indexes


def index_json(files: Sequence[OutputFile]) -> dict[str, object]:
    """Return the index of a part's shards, as transformers reads it."""
    path = in_folder(folder_of(files[0].name), "")
    weight_map = {
        tensor.name.removeprefix(path): file.name.removeprefix(path) for file in files for tensor in file.tensors
    }
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
