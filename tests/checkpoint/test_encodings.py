"""Stored encodings: what is read is what the library that defines each gives, bit for bit, at any start and length.

``data/make_encodings.py`` wrote the fixtures with those libraries.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.checkpoint.encodings import mxfp4, pieces
from mergekit_lite.checkpoint.reader import Reader
from tests.models import same_bytes

DATA = Path(__file__).parent / "data"
FIXTURES = (
    "bitsandbytes",
    "compressed_tensors_fp4",
    "compressed_tensors_fp8",
    "compressed_tensors_int8",
    "compressed_tensors_mxfp8",
    "compressed_tensors_pack",
    "modelopt",
    "mxfp4",
)
EXPECTED = " expected"


def stored(fixture: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Return a fixture's stored tensors, the values that its library gives by name, and its config."""
    tensors = load_file(DATA / f"{fixture}.safetensors")
    with safe_open(DATA / f"{fixture}.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    expected = {name.removesuffix(EXPECTED): value for name, value in tensors.items() if name.endswith(EXPECTED)}
    return {name: value for name, value in tensors.items() if not name.endswith(EXPECTED)}, expected, config


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    """Write a model folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def opened(folder: Path, fixture: str) -> Checkpoint:
    """Open a model folder with a fixture's tensors."""
    tensors, _, config = stored(fixture)
    return open_checkpoint(write(folder, tensors | {"norm.weight": torch.ones(3)}, config))


@pytest.mark.parametrize("fixture", FIXTURES)
def test_values_are_the_librarys_at_any_start_and_length(tmp_path: Path, fixture: str) -> None:
    checkpoint, expected = opened(tmp_path, fixture), stored(fixture)[1]
    assert checkpoint.tensors.keys() == {*expected, "norm.weight"}
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    with Reader() as reader:
        for name, value in expected.items():
            spec = checkpoint.tensors[name]
            assert spec.name == name and spec.shape == tuple(value.shape) and spec.quantised
            ranges = [(0, spec.numel)]
            for _ in range(20):
                start = draw.randrange(spec.numel)
                ranges.append((start, draw.randint(0, min(spec.numel - start, draw.choice([5, 200, 10_000])))))
            for start, length in ranges:
                piece, strip = draw.choice([7, 64, 500] if length < 300 else [500, 1 << 20]), draw.choice([99, 1 << 20])
                with mock.patch.object(pieces, "PIECE", piece), mock.patch.object(mxfp4, "STRIP", strip):
                    values = spec.elements(reader, start, length)
                # FP8 is float32 and exact; its libraries round the product to the scales' dtype.
                values = values.to(value.dtype) if "fp8" in fixture else values
                assert values.dtype == value.dtype, name
                assert same_bytes(values, value.flatten()[start : start + length]), (name, start, length)
