"""Quantised checkpoints: what is read equals the naive whole-tensor formula, the rest is refused by name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.encodings import pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.errors import CheckpointError

FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


def write_model(folder: Path, tensors: Tensors, quantization: dict | None = None, other_shard: Tensors | None = None):
    """A model folder; with ``other_shard`` in two shards with an index."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "tiny"} | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    if other_shard is None:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number, shard in enumerate([tensors, other_shard], start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def codes(*shape: int, dtype: torch.dtype = FP8) -> torch.Tensor:
    """Random finite codes of every magnitude."""
    return (torch.randn(shape) * torch.randn(shape).exp()).clamp(-400, 400).to(dtype)


def naive(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The formula on the whole tensor: each scale repeated over its block, the overhang cut off."""
    spread = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return weight.float() * spread[..., : weight.shape[-2], : weight.shape[-1]]


def read(folder: Path, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
    spec = open_checkpoint(folder).tensors[name]
    assert spec.dtype == "float32"
    out = torch.full((spec.numel - start if count is None else count,), torch.nan)
    with Reader() as reader:
        spec.read(reader, start, out)
    return out


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@settings(max_examples=60)
@given(data=st.data())
def test_any_part_of_a_block_scaled_tensor_is_that_part_of_the_naive_whole(data):
    stack = data.draw(st.lists(st.integers(1, 3), max_size=1))
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = data.draw(st.tuples(st.integers(1, 16), st.integers(1, 16)))
    start = data.draw(st.integers(0, rows * columns - 1))
    count = data.draw(st.integers(0, rows * columns - start))
    grid = [-(-rows // block[0]), -(-columns // block[1])]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    weight, scale = codes(*stack, rows, columns), torch.rand(*stack, *grid).add(0.5).to(dtype)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(pieces, "PIECE", data.draw(st.integers(1, 200))),
    ):
        model = write_model(
            Path(folder),
            {"x.weight": weight, "x.weight_scale_inv": scale},
            {"quant_method": "fp8", "weight_block_size": list(block)},
        )
        expected = naive(weight, scale, block).flatten()[start : start + count]
        assert torch.equal(read(model, "x.weight", start, count), expected)


@pytest.mark.parametrize("shape", [(128, 128), (129, 255), (1, 1), (300, 64), (2, 200, 130)])
def test_deepseek_blocks_with_the_scale_in_another_shard(tmp_path, shape):
    weight = codes(*shape)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    model = write_model(tmp_path, {"x.weight": weight}, BLOCK_FP8, {"x.weight_scale_inv": scale})
    assert torch.equal(read(model, "x.weight"), naive(weight, scale, (128, 128)).flatten())


@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [
        ((6, 10), ()),
        ((6, 10), (1,)),
        ((6, 10), (6, 1)),
        ((6, 10), (6,)),
        ((6, 10), (1, 10)),
        ((6, 6), (6,)),
        ((3, 6, 10), ()),
        ((3, 6, 10), (3,)),
        ((3, 6, 10), (3, 1, 1)),
        ((3, 6, 10), (3, 6)),
        ((3, 6, 10), (3, 6, 1)),
        ((3, 6, 10), (3, 1, 10)),
        ((10,), (1,)),
        ((), ()),
        ((0, 10), (1,)),
    ],
)
@pytest.mark.parametrize("ending", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("method", ["compressed-tensors", "fbgemm_fp8", "fp8", "modelopt"])
def test_one_scale_a_tensor_a_row_a_column_or_a_matrix(tmp_path, shape, scale_shape, ending, method):
    weight, scale = codes(*shape), torch.rand(scale_shape)
    model = write_model(tmp_path, {"x.weight": weight, "x.weight" + ending: scale}, {"quant_method": method})
    if scale.numel() == 1:
        spread = scale.reshape(())
    else:
        spread = scale.reshape(*scale_shape, *[1] * (len(shape) - len(scale_shape)))
    assert torch.equal(read(model, "x.weight"), (weight.float() * spread).flatten())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code_has_its_value(tmp_path, dtype):
    weight = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(2, 128)
    model = write_model(tmp_path, {"x.weight": weight, "x.weight_scale": torch.tensor([3.0])})
    assert torch.equal(read(model, "x.weight").view(torch.int32), (weight.float() * 3).flatten().view(torch.int32))


def test_power_of_two_scales(tmp_path):
    weight = codes(256, 128)
    scale = torch.tensor([[120], [130]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    model = write_model(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scale}, BLOCK_FP8)
    expected = weight.float() * torch.tensor([2.0**-7, 2.0**3]).repeat_interleave(128)[:, None]
    assert torch.equal(read(model, "x.weight"), expected.flatten())


def test_stacked_experts_without_a_weight_ending(tmp_path):
    weight, scale = codes(2, 4, 8), torch.rand(2, 1, 8)
    model = write_model(tmp_path, {"experts.gate_up_proj": weight, "experts.gate_up_proj_scale": scale})
    assert torch.equal(read(model, "experts.gate_up_proj"), (weight.float() * scale).flatten())


def test_transposed_codes_and_scales_of_a_torch_file(tmp_path):
    weight, scale = codes(10, 6).T, torch.rand(5, 3).T
    torch.save({"x.weight": weight, "x.weight_scale_inv": scale}, tmp_path / "pytorch_model.bin")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(read(tmp_path, "x.weight"), naive(weight, scale, (2, 2)).flatten())


def test_block_size_of_compressed_tensors_and_of_a_nested_config(tmp_path):
    weight, scale = codes(6, 9), torch.rand(3, 3)
    groups = {"group_0": {"weights": {"strategy": "block", "block_structure": [2, 4], "num_bits": 8}}}
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    model = write_model(tmp_path, {"x.weight": weight, "x.weight_scale": scale})
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": quantization}}))
    assert torch.equal(read(model, "x.weight"), naive(weight, scale, (2, 4)).flatten())


def test_scales_are_left_out_with_a_reason_and_the_rest_stays(tmp_path):
    model = write_model(
        tmp_path,
        {
            "x.weight": codes(4, 4),
            "x.weight_scale": torch.ones(1),
            "x.input_scale": torch.ones(1),
            "attn.k_scale": torch.ones(1),
            "norm.weight": torch.ones(4, dtype=torch.bfloat16),
            "gate.e_score_correction_bias": torch.ones(4),
        },
        {"quant_method": "compressed-tensors"},
    )
    checkpoint = open_checkpoint(model)
    assert set(checkpoint.tensors) == {"x.weight", "norm.weight", "gate.e_score_correction_bias"}
    assert set(checkpoint.left_out) == {"x.weight_scale", "x.input_scale", "attn.k_scale"}
    assert "x.weight" in checkpoint.left_out["x.weight_scale"]
    assert checkpoint.tensors["norm.weight"].dtype == "bfloat16"
    assert checkpoint.tensors["x.weight"].nbytes == 16


def test_a_config_left_over_from_quantisation_does_not_refuse_plain_floats(tmp_path):
    tensors = {"x.weight": torch.rand(4, 4), "position_ids": torch.arange(4)[None]}
    for method in ("bitsandbytes", "gptq", "fp8", "something-new"):
        checkpoint = open_checkpoint(write_model(tmp_path, tensors, {"quant_method": method}))
        assert set(checkpoint.tensors) == set(tensors)


def test_scales_that_a_plain_model_learned_stay(tmp_path):
    tensors = {"logit_scale": torch.ones(1), "attn.k_scale": torch.ones(1), "mlp.input_scale": torch.ones(3)}
    tensors |= {"step": i32(), "step_scale": torch.ones(())}
    assert set(open_checkpoint(write_model(tmp_path, tensors)).tensors) == set(tensors)


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def i8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


REFUSED = {
    "bitsandbytes": [
        {"x.weight": u8(8, 1), "x.weight.absmax": u8(2), "x.weight.quant_state.bitsandbytes__nf4": u8(9)},
        {"x.weight.absmax": u8(2), "x.weight.quant_map": torch.ones(16)},
    ],
    "GPTQ": [{"x.qweight": i32(2, 4), "x.qzeros": i32(1, 1), "x.g_idx": i32(8), "x.scales": torch.ones(1, 4)}],
    "AWQ": [{"x.qweight": i32(2, 4), "x.qzeros": i32(1, 1), "x.scales": torch.ones(1, 4)}],
    "MXFP4": [{"mlp.experts.other_blocks": u8(2, 4, 1, 16), "mlp.experts.other_scales": u8(2, 4, 1)}],
    "NVFP4": [{"x.gate_up_proj": u8(4, 2), "x.gate_up_proj_weight_scale_2": torch.ones(1)}],
    "packed": [{"x.weight_packed": i32(4, 1), "x.weight_scale": torch.ones(4, 1), "x.weight_shape": i32(2)}],
    "sparse": [{"x.compressed": torch.ones(4), "x.bitmask": u8(4, 4), "x.row_offsets": i32(4, 1)}],
    "int8": [
        {"x.weight": i8(4, 4), "x.weight_scale": torch.ones(4, 1)},
        {"x.weight": i8(4, 4), "x.weight_scales": torch.ones(4)},
        {"x.weight": i8(4, 4), "x.scale": torch.ones(4)},
    ],
    "HQQ": [{"x.W_q": u8(4, 4), "x.scale": torch.ones(4)}],
    "quanto": [{"x.weight._data": i8(4, 4), "x.weight._scale": torch.ones(4)}],
    "torchao": [{"x._weight_qdata": i8(4, 4), "x._weight_scale": torch.ones(4)}],
}


@pytest.mark.parametrize(("name", "tensors"), [(name, case) for name, cases in REFUSED.items() for case in cases])
def test_other_formats_are_refused_by_name_with_a_remedy(tmp_path, name, tensors):
    message = refusal(write_model(tmp_path, tensors, {"quant_method": "of its own"}))
    assert name in message and "Use the checkpoint" in message and str(tmp_path) in message
    assert "1 problem" in message, message  # what belongs to a named scheme is no second one


def test_other_methods_of_the_config_are_refused_where_there_are_codes(tmp_path):
    message = refusal(write_model(tmp_path, {"x.weight": i8(4, 4)}, {"quant_method": "eetq"}))
    assert "'eetq'" in message and "x.weight" in message
    fp8 = {"x.weight": codes(4, 4), "x.weight_scale": torch.ones(1)}
    assert "'quark'" in refusal(write_model(tmp_path, fp8, {"quant_method": "quark"}))


@pytest.mark.parametrize(
    ("tensors", "quantization", "words"),
    [
        ({"x.weight": codes(4, 4)}, None, "codes without a scale"),
        ({"x.weight": codes(200, 4), "x.weight_scale_inv": torch.ones(2, 1)}, None, "none given"),
        ({"x.weight": codes(200, 4), "x.weight_scale_inv": torch.ones(3, 1)}, BLOCK_FP8, "128 × 128"),
        ({"x.weight": codes(4, 4), "x.weight_scale_inv": torch.ones(2, 2)}, BLOCK_FP8, "doesn't fit"),
        ({"x.weight": codes(4), "x.weight_scale": torch.ones(4)}, None, "doesn't fit"),
        ({"x.weight": codes(4), "x.weight_scale": torch.ones(1, 4)}, None, "doesn't fit"),
        ({"x.weight": codes(4, 4), "x.weight_scale": torch.ones(0)}, None, "doesn't fit"),
        ({"x.weight": codes(4, 4), "x.weight_scale": torch.ones(1), "x.weight_scale_inv": torch.ones(1)}, None, "both"),
        ({"x.weight": codes(4, 4), "x.weight_scale": torch.ones(1).double()}, None, "should be one of"),
        ({"x.weight": codes(4, 4), "x.weight_scale": u8(4, 1)}, None, "should be one of"),
        (
            {"x.weight": codes(4, 4), "x.weight_scale": torch.ones(1), "x.weight_zero_point": codes(1)},
            None,
            "zero point",
        ),
        ({"x.weight_scale_inv": torch.ones(1)}, BLOCK_FP8, "isn't here"),
        ({"x.weight": torch.ones(4, 4), "x.weight_scale": torch.ones(4, 1)}, None, "applied already"),
        ({"x.scale": u8(4).view(torch.float8_e8m0fnu)}, None, "unknown scheme"),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(tmp_path, tensors, quantization, words):
    assert words in refusal(write_model(tmp_path, tensors, quantization))


def test_all_refusals_of_a_checkpoint_come_at_once_and_bounded(tmp_path):
    message = refusal(write_model(tmp_path, {f"layers.{number}.weight": codes(2, 2) for number in range(1000)}))
    assert "1,000 problems" in message and "980 more" in message and len(message) < 10_000
    mixed = {"a.qweight": i32(2, 2), "b.W_q": u8(2), "c.weight": i8(2, 2), "c.weight_scale": torch.ones(2)}
    assert "3 problems" in refusal(write_model(tmp_path, mixed))


@pytest.mark.parametrize("size", [[0, 128], [128], [-1, 1], "128", [1.5, 2], [True, True], {"a": 1}, [10**200, 1]])
@pytest.mark.parametrize("groups", [None, [], {"g": None}, {"g": {"weights": {"strategy": "block"}}}])
def test_nonsense_in_the_config_is_no_block_size(tmp_path, size, groups):
    quantization = {"quant_method": "fp8", "weight_block_size": size, "config_groups": groups}
    tensors = {"x.weight": codes(200, 200), "x.weight_scale_inv": torch.ones(2, 2)}
    assert "doesn't fit" in refusal(write_model(tmp_path, tensors, quantization))
