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
from mergekit_lite.comparison.inspection import inspect
from mergekit_lite.errors import CheckpointError
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


@pytest.mark.parametrize("fixture", FIXTURES)
def test_parts_are_left_out_with_a_reason(tmp_path: Path, fixture: str) -> None:
    tensors, expected, _ = stored(fixture)
    checkpoint = opened(tmp_path, fixture)
    codes = {name + ending for name in expected for ending in ("", "_packed", "_blocks")}
    assert checkpoint.left_out.keys() == tensors.keys() - codes
    assert all(" of " in reason for reason in checkpoint.left_out.values())


NAMED = {
    "bitsandbytes": "FP4, LLM.int8, NF4",
    "compressed_tensors_fp4": "MXFP4, NVFP4",
    "compressed_tensors_fp8": "FP8",
    "compressed_tensors_int8": "INT4, INT8",
    "compressed_tensors_pack": "INT2, INT3, INT4, INT5, INT8",
    "modelopt": "NVFP4",
    "mxfp4": "MXFP4",
}


@pytest.mark.parametrize(("fixture", "schemes"), NAMED.items())
def test_inspect_names_the_scheme(tmp_path: Path, fixture: str, schemes: str) -> None:
    opened(tmp_path, fixture)
    assert f" as {schemes} in " in inspect(tmp_path).quantised


PARTS = [(fixture, name) for fixture in FIXTURES for name in load_file(DATA / f"{fixture}.safetensors")]
PARTS = [
    (fixture, name)
    for fixture, name in PARTS
    if not name.endswith((EXPECTED, "weight", "_packed", "_blocks", "weight_format", "input_scale"))
]


@pytest.mark.parametrize(("fixture", "name"), PARTS)
def test_a_part_that_is_missing_or_has_another_shape_is_one_error(tmp_path: Path, fixture: str, name: str) -> None:
    tensors, expected, config = stored(fixture)
    layer = max((each for each in expected if name.startswith(each.removesuffix("weight"))), key=len)
    other = torch.zeros(5, 5, 5).to(tensors[name].dtype)
    rest = {each: value for each, value in tensors.items() if each != name}
    for changed in (rest, rest | {name: other}):
        with pytest.raises(CheckpointError) as refused:
            open_checkpoint(write(tmp_path, changed, config))
        message = str(refused.value)
        assert "1 problem" in message and layer.removesuffix("weight") in message, message


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    tensors, expected, config = stored("compressed_tensors_pack")
    scales = [name for name in tensors if name.endswith("weight_scale")]
    with pytest.raises(CheckpointError, match=f"{len(expected)} problems") as refused:
        open_checkpoint(write(tmp_path, {name: tensors[name] for name in tensors if name not in scales}, config))
    assert all(name in str(refused.value) for name in scales)


def test_weights_are_written_in_the_dtype_that_the_config_names(tmp_path: Path) -> None:
    tensors, _, config = stored("bitsandbytes")
    for named, of_bf16, of_int8 in (
        ("float16", "float16", "float16"),
        ("float32", "float32", None),
        (None, None, "bfloat16"),
    ):
        specs = open_checkpoint(write(tmp_path, tensors, config | {"torch_dtype": named})).tensors
        assert specs["0.nf4.bf16.weight"].written_as == of_bf16
        assert specs["int8.weight"].dtype == "float32" and specs["int8.weight"].written_as == of_int8


def group(**weights: object) -> dict:
    """Return a config of compressed-tensors with one group for all layers."""
    quantization = {"quant_method": "compressed-tensors", "format": weights.pop("format", "pack-quantized")}
    quantization |= {key: weights.pop(key) for key in ("transform_config",) if key in weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, **weights}}}
    return {"quantization_config": quantization | {"config_groups": groups}}


PACKED = {
    "x.weight_packed": torch.ones(4, 8, dtype=torch.int32),
    "x.weight_scale": torch.ones(4, 2),
    "x.weight_shape": torch.tensor([4, 64]),
}
FOUR_BITS = {"strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (PACKED, {}, "isn't its own"),
        (PACKED, group(**FOUR_BITS, format="marlin-24"), "in 0 ways"),
        (PACKED, group(strategy="group", group_size=24), "don't fit a weight of (4, 64)"),
        (PACKED, group(strategy="token"), "scales by 'token'"),
        (PACKED, group(**FOUR_BITS, num_bits=3), "3 bits for each of (4, 64)"),
        (PACKED, group(**FOUR_BITS, symmetric=False), "zero point x.weight_zero_point is missing"),
        (PACKED, group(**FOUR_BITS, transform_config={"config_groups": {"R1": {}}}), "while the model runs"),
        (PACKED | {"x.weight_g_idx": torch.zeros(64).int()}, group(**FOUR_BITS), "order of their own"),
        (PACKED | {"x.weight": torch.ones(4, 64)}, group(**FOUR_BITS), "is stored too"),
        (PACKED | {"x.weight_shape": torch.tensor([-4, 1 << 60])}, group(**FOUR_BITS), "4 bits for each of (-4,"),
        ({"x.weight": torch.ones(4, 4).char()}, group(format="int-quantized", num_bits=8), "x.weight_scale is missing"),
        (
            {"x.weight": torch.ones(8, 1).byte()},
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "0 descriptions",
        ),
        ({"x.weight": torch.ones(8, 1).byte()}, {}, "in no scheme that is known"),
        ({"x.weight": torch.ones(8).char()}, {}, "in no scheme that is known"),
        ({"x.packed": torch.ones(8, 1).byte()}, {}, "in no scheme that is known"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path: Path, tensors: dict, config: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match="1 problem") as refused:
        open_checkpoint(write(tmp_path, tensors, config))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("state", "value"),
    [
        ("shape", [1 << 50, 4]),
        ("shape", "x"),
        ("dtype", "int8"),
        ("blocksize", 0),
        ("nested_offset", "1"),
        ("nested_dtype", "int8"),
    ],
)
def test_nonsense_in_the_description_of_a_4_bit_weight_is_refused(tmp_path: Path, state: str, value: object) -> None:
    tensors, _, config = stored("bitsandbytes")
    name = "0.nf4.bf16.weight.quant_state.bitsandbytes__nf4"
    changed = json.loads(bytes(tensors[name])) | {state: value}
    for text in (json.dumps(changed), "[" * 60_000, "{}", "[]", ""):
        description = torch.tensor(list(text.encode()), dtype=torch.uint8)
        with pytest.raises(CheckpointError, match="isn't the description"):
            open_checkpoint(write(tmp_path, tensors | {name: description}, config))


def test_layers_that_bitsandbytes_stores_transposed_are_refused(tmp_path: Path) -> None:
    tensors, _, config = stored("bitsandbytes")
    with pytest.raises(CheckpointError, match="7 problems") as refused:
        open_checkpoint(write(tmp_path, tensors, config | {"model_type": "gpt2"}))
    assert "transposed" in str(refused.value)


def test_the_group_of_the_config_that_names_a_layer_decides(tmp_path: Path) -> None:
    tensors, expected, config = stored("compressed_tensors_pack")
    groups = config["quantization_config"]["config_groups"]
    for hostile in ("re:(a+)+$", "re:(", "re:" + "a" * 1000):
        groups["group_0"]["targets"].append(hostile)
    del groups["group_3"]["targets"][:]
    with pytest.raises(CheckpointError, match=r"1 problem[^\n]*\n.*layers\.3\.proj.*in 0 ways"):
        open_checkpoint(write(tmp_path, tensors, config))
    groups["group_3"]["targets"] = ["Linear"]  # a kind of layer: for those that no group names
    assert open_checkpoint(write(tmp_path, tensors, config)).tensors.keys() == expected.keys()
