"""Rows of encoded matrices gathered at once: the same values as the whole matrix has, whatever the encoding."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.checkpoint.encodings.block_scaled import BlockScaled
from mergekit_lite.checkpoint.encodings.dense import Dense
from mergekit_lite.checkpoint.encodings.gathered import Places, gathered, part_of, rows_of
from mergekit_lite.checkpoint.encodings.ggml import GgmlBlocks
from mergekit_lite.checkpoint.encodings.strided import Strided
from mergekit_lite.checkpoint.encodings.sum import Sum
from mergekit_lite.checkpoint.formats import safetensors
from mergekit_lite.checkpoint.reader import Reader
from tests.models import same_bytes

ROWS, COLUMNS = 300, 160


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    save_file(tensors, folder / "m.safetensors")
    return dict(safetensors.read_header(folder / "m.safetensors").tensors)


def scaled(folder: Path, block: tuple[int, int], *, zero: bool = False) -> TensorSpec:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(ROWS, COLUMNS, generator=generator)
    shape = (-(-ROWS // block[0]), -(-COLUMNS // block[1]))
    tensors = {"codes": codes.to(torch.float8_e4m3fn), "scale": torch.rand(shape, generator=generator) + 0.5}
    if zero:
        tensors["zero"] = torch.randn(shape, generator=generator)
    specs = stored(folder, tensors)
    encoding = BlockScaled(specs["codes"], specs["scale"], block, specs.get("zero"))
    return replace(specs["codes"], name="w", dtype="bfloat16", encoding=encoding)


def ggml(folder: Path) -> TensorSpec:
    library = pytest.importorskip("gguf")
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    blocks = library.quantize(values, library.GGMLQuantizationType.Q8_0)
    (folder / "m.bin").write_bytes(b"head" + blocks.tobytes())
    return TensorSpec("w", "float32", (ROWS, COLUMNS), folder / "m.bin", 4, GgmlBlocks("Q8_0", 32, 34))


def plain(folder: Path) -> TensorSpec:
    return stored(folder, {"w": torch.randn(ROWS, COLUMNS)})["w"]


def differences(folder: Path) -> TensorSpec:
    """Return what a task vector holds of a tensor."""
    term = Dense(plain(folder), scale=0.3)
    return replace(term.values, encoding=Sum(None, (term,)))


def turned(folder: Path) -> TensorSpec:
    """Return a matrix that lies there turned, whose rows are read one by one."""
    whole = stored(folder, {"w": torch.randn(COLUMNS, ROWS)})["w"]
    return replace(whole, shape=(ROWS, COLUMNS), encoding=Strided((1, ROWS)))


KINDS = {
    "a scale for each row": lambda folder: scaled(folder, (1, COLUMNS)),
    "a scale for all": lambda folder: scaled(folder, (ROWS, COLUMNS)),
    "blocks": lambda folder: scaled(folder, (128, 64)),
    "blocks with zero points": lambda folder: scaled(folder, (64, 64), zero=True),
    "GGUF": ggml,
    "another dtype": plain,
    "differences": differences,
    "turned": turned,
}


def reads_by_torch(spec: TensorSpec) -> bool:
    return spec.encoding.needs_torch(spec)


@pytest.mark.parametrize("kind", KINDS)
def test_gathered_rows_are_those_of_the_matrix(tmp_path: Path, kind: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    spec = KINDS[kind](tmp_path)
    assert (rows_of(spec, np.array([1], np.int32)) is None) == (kind == "turned")
    (tmp_path / "other").mkdir()
    other = stored(tmp_path / "other", {"w": torch.randn(ROWS, COLUMNS).bfloat16()})["w"]
    row = np.array([draw.randrange(ROWS) for _ in range(500)], np.int32)
    matrix = np.array([draw.randrange(2) for _ in row], np.int32)
    made = gathered(spec, [spec, other], Places(matrix, row))
    with Reader() as reader:
        wholes = [each.elements(reader, 0, each.numel).view(ROWS, COLUMNS) for each in (spec, other)]
        dtype = torch.bfloat16 if made.dtype == "bfloat16" else torch.float32
        expected = torch.stack([wholes[m][r].to(dtype) for m, r in zip(matrix, row, strict=True)]).view(-1)
        assert same_bytes(made.elements(reader, 0, made.numel), expected)
        for _ in range(30):
            begin = draw.randrange(made.numel)
            count = draw.randint(1, min(5 * COLUMNS, made.numel - begin))
            part = part_of(made, begin, begin + count)
            assert same_bytes(part.elements(reader, begin, count), expected[begin : begin + count])


def test_rows_that_are_bytes_of_files_are_read_without_torch(tmp_path: Path) -> None:
    spec, rows = plain(tmp_path), np.arange(ROWS, dtype=np.int32)[::-1].copy()
    zeros = np.zeros(ROWS, np.int32)
    assert not reads_by_torch(spec)
    assert not reads_by_torch(gathered(spec, [spec], Places(zeros, rows)))
    assert not reads_by_torch(gathered(spec, [spec], Places(zeros - 1, rows, ((),))))
    assert reads_by_torch(gathered(spec, [spec], Places(zeros - 1, rows, (((0, 1), (0, 2)),))))
    (tmp_path / "fp8").mkdir()
    fp8 = scaled(tmp_path / "fp8", (128, 64))
    assert reads_by_torch(gathered(fp8, [fp8], Places(zeros, rows)))
