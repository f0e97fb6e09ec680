"""A format and an encoding that the package doesn't know: one entry in the table of formats is all that they need."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import mergekit_lite
from mergekit_lite.checkpoint import formats, open_checkpoint
from mergekit_lite.checkpoint.encodings import pieces
from mergekit_lite.checkpoint.formats.header import Header, WeightFile
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.comparison.inspection import inspect
from tests.checkpoint.reading import read_all
from tests.models import State, read_folder, same_bytes, state, tuned, write_folder

SIZE = 32  # elements in a block
BLOCK = np.dtype([("scale", "<f4"), ("nibbles", "u1", SIZE // 2)])


@dataclass(frozen=True, slots=True)
class Nibbles(Encoding):
    """Blocks of 32 elements: a scale, and four bits for each element."""

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        for begin, piece in pieces.pieces(start, out, spec.dtype):
            first, last = begin // SIZE, -(-(begin + piece.numel()) // SIZE)
            stored = bytearray((last - first) * BLOCK.itemsize)
            reader.fill(spec.file, spec.offset + first * BLOCK.itemsize, memoryview(stored), spec.name)
            values = torch.from_numpy(values_of(np.frombuffer(stored, BLOCK)))
            piece.copy_(values[begin - first * SIZE :][: piece.numel()])

    def stored_dtype(self, spec: TensorSpec) -> str:
        return "nibbles"

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        return -(-count // SIZE) * BLOCK.itemsize

    @property
    def block(self) -> Block:
        return 1, SIZE


def values_of(blocks: np.ndarray) -> np.ndarray:
    """Return the values of blocks, float32."""
    codes = np.stack([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], -1).reshape(len(blocks), SIZE)
    return ((codes.astype("f4") - 8) * blocks["scale"][:, None]).reshape(-1)


def blocks_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's elements as blocks, rounded to four bits."""
    values = np.zeros(-(-tensor.numel() // SIZE) * SIZE, "f4")
    values[: tensor.numel()] = tensor.float().flatten().numpy()
    blocks = np.empty(len(values) // SIZE, BLOCK)
    blocks["scale"] = np.maximum(np.abs(values.reshape(-1, SIZE)).max(1) / 7, 1e-30)
    codes = (np.round(values.reshape(-1, SIZE) / blocks["scale"][:, None]) + 8).astype("u1")
    blocks["nibbles"] = codes[:, ::2] | codes[:, 1::2] << 4
    return blocks


def write(path: Path, tensors: State) -> State:
    """Write a file: a line of JSON with the shapes, then the blocks. Return the values that it stands for."""
    blocks = {name: blocks_of(tensor) for name, tensor in tensors.items()}
    line = json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()}).encode() + b"\n"
    path.write_bytes(line + b"".join(each.tobytes() for each in blocks.values()))
    return {
        name: torch.from_numpy(values_of(blocks[name])[: tensor.numel()]).view(tensor.shape)
        for name, tensor in tensors.items()
    }


def read_header(path: Path) -> Header:
    with path.open("rb") as file:
        line = file.readline()
    shapes: Mapping[str, list[int]] = json.loads(line)
    tensors, offset = {}, len(line)
    for name, shape in shapes.items():
        tensors[name] = TensorSpec(name, "float32", tuple(shape), path, offset, Nibbles(), "bfloat16")
        offset += -(-math.prod(shape) // SIZE) * BLOCK.itemsize
    return Header(WeightFile.identify(path, line), tensors)


FORMAT = SimpleNamespace(SUFFIXES=(".nibbles",), MODEL_NAMES=(), ADAPTER_NAMES=(), read_header=read_header)
known = mock.patch.dict(formats._BY_SUFFIX, {".nibbles": FORMAT})


@known
@given(st.data())
def test_any_run_of_elements_is_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("run") / "a.nibbles"
    count = data.draw(st.integers(1, 300))
    [values] = write(path, {"x": torch.randn(count, generator=torch.Generator().manual_seed(count))}).values()
    start = data.draw(st.integers(0, count - 1))
    length = data.draw(st.integers(0, count - start))
    with Reader() as reader, mock.patch.object(pieces, "PIECE", data.draw(st.integers(1, 100))):
        found = open_checkpoint(path).tensors["x"].elements(reader, start, length)
    assert same_bytes(found, values[start : start + length])


@known
def test_it_is_opened_inspected_and_merged_like_any_other(tmp_path):
    base = state(1, torch.float32)
    stands_for = [write(tmp_path / f"{number}.nibbles", tuned(base, number, 0.01)) for number in range(2)]
    checkpoint = open_checkpoint(tmp_path / "0.nibbles")
    found = read_all(checkpoint)
    assert all(same_bytes(found[name], tensor) for name, tensor in stands_for[0].items())
    assert (
        inspect(tmp_path / "0.nibbles").quantised == f"{len(base)} tensors in nibbles, a scale for each block of 1×32"
    )
    assert (
        sum(spec.nbytes for spec in checkpoint.tensors.values()) < sum(4 * each.numel() for each in base.values()) / 4
    )

    for number, tensors in enumerate(stands_for):
        write_folder(tmp_path / f"plain-{number}", tensors)
    for pair, output in ((("0.nibbles", "1.nibbles"), "from-nibbles"), (("plain-0", "plain-1"), "from-plain")):
        sft, aligned = (tmp_path / name for name in pair)
        mergekit_lite.extrapolate(sft, aligned, tmp_path / output, alpha=0.5, out_dtype="float32")
    merged, expected = read_folder(tmp_path / "from-nibbles"), read_folder(tmp_path / "from-plain")
    assert merged.keys() == expected.keys()
    assert all(same_bytes(merged[name], tensor) for name, tensor in expected.items())
