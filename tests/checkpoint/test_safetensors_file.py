"""Safetensors files: what the library writes, we read alike, and where we differ from it we are the stricter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import formats, open_checkpoint
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.errors import CheckpointError, RunError
from tests.checkpoint.reading import assert_reads_as, bits

PLAIN = [dtype for dtype in dtypes.TABLE if dtype.kind != "scaled"]


def tensor_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits as a tensor; any bit pattern must survive."""
    dtype = dtypes.BY_NAME[name]
    count = torch.Size(shape).numel() * dtype.size
    raw = torch.randint(0, 2 if name == "bool" else 256, (count,), dtype=torch.uint8)
    return raw.view(dtypes.torch_dtype(name)).view(shape)


names = st.text(
    st.characters(categories=["L", "N", "P", "S"], exclude_characters="._"), max_size=30
)  # no x.weight_scale
CODES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")  # matrices of these are refused but for masks
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensors = st.dictionaries(
    names, st.builds(tensor_of, st.sampled_from([dtype.name for dtype in PLAIN]), shapes), max_size=8
)


@settings(max_examples=80)
@given(tensors, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_any_file_of_the_library_reads_as_the_library_reads_it(expected, metadata):
    expected.pop("__metadata__", None)
    expected = {f"{name}.mask" if dtypes.name_of(x.dtype) in CODES else name: x for name, x in expected.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        save_file(expected, path, metadata or None)
        assert_reads_as(path, load_file(path))
        assert formats.read_header(path).metadata == metadata
        with safe_open(path, "pt") as opened:
            in_file_order = list(formats.read_header(path).tensors)
            assert sorted(in_file_order) == sorted(opened.keys())


@settings(max_examples=40)
@given(st.data())
def test_any_part_is_that_part_of_the_whole(data):
    whole = tensor_of(data.draw(st.sampled_from(["bfloat16", "float32", "int64", "bool"])), (7, 11))
    start = data.draw(st.integers(0, 77))
    with tempfile.TemporaryDirectory() as folder, Reader() as reader:
        path = Path(folder, "x.safetensors")
        save_file({"first": torch.ones(3), "x": whole}, path)
        out = torch.empty(data.draw(st.integers(0, 77 - start)), dtype=whole.dtype)
        spec = open_checkpoint(path).tensors["x"]
        spec.read(reader, start, out)
        assert bits(out) == bits(whole.flatten()[start : start + len(out)])


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, dtype=torch.int8), "b": torch.ones(2), "c": torch.ones(2, dtype=torch.int8)}, path)
    specs = list(open_checkpoint(path).tensors.values())
    assert [spec.offset for spec in specs] == sorted(spec.offset for spec in specs)
    assert specs[-1].offset + specs[-1].nbytes == path.stat().st_size


def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(64)}, path)
    checkpoint = open_checkpoint(path)
    checkpoint.check_unchanged()
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="changed since it was planned"):
        checkpoint.check_unchanged()
    with Reader() as reader, pytest.raises(RunError, match="'a'"):
        checkpoint.tensors["a"].read(reader, 0, torch.empty(64))
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.check_unchanged()
    with Reader() as reader, pytest.raises(RunError, match="can't be read"):
        checkpoint.tensors["a"].read(reader, 0, torch.empty(64))


def test_the_digest_tells_headers_apart(tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, tensor in zip(paths, [torch.ones(4), torch.zeros(4), torch.ones(2, 2)], strict=True):
        save_file({"a": tensor}, path)
    first, same, other = (open_checkpoint(path).files[0].header_digest for path in paths)
    assert first == same != other


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "Q4_0", "", 7, None, ["F32"]])
def test_dtypes_that_are_not_in_the_table_are_named(tmp_path, code):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": code, "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match="'a': dtype"):
        open_checkpoint(path)
