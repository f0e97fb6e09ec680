"""A LoRA over a base: what is read equals the fold made by hand, however it is cut."""

from __future__ import annotations

import math
import struct
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import open_adapter, open_checkpoint
from mergekit_lite.checkpoint.encodings import dora, low_rank, pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError
from tests.adapters import PREFIX, folded, lora, over, write_adapter
from tests.checkpoint.reading import bits, read_all
from tests.models import State, same_bytes, state, write_folder

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_fold_is_the_naive_one(tmp_path, base_dtype, dtype, file):
    base = state(0, base_dtype)
    tensors = lora(Q, 8, 8, dtype=dtype) | lora(UP, 16, 8, seed=1, dtype=dtype)
    found = over(tmp_path, base, tensors, file=file)
    expected = folded(base, tensors)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        if name.removesuffix(".weight") not in (Q, UP):
            assert same_bytes(tensor, base[name])
            continue
        assert tensor.dtype == (torch.float64 if base_dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-7, atol=2e-9)
        assert not torch.equal(tensor.double(), base[name].double())


def test_bfloat16_factors_fold_exactly(tmp_path):
    base, tensors = state(0), lora(Q, 8, 8, dtype=torch.bfloat16)
    found, expected = over(tmp_path, base, tensors), folded(base, tensors)
    assert torch.equal(found[f"{Q}.weight"], expected[f"{Q}.weight"].float())


@pytest.mark.parametrize("rank", [1, 3, 64, 300])
def test_any_rank_and_factors_of_any_size(tmp_path, rank):
    tensors = lora(Q, 8, 8, rank=rank)
    for number, (name, tensor) in enumerate(tensors.items()):
        sizes = torch.logspace(-6, 6, rank) ** (1 - 2 * number)  # what one factor gains along the rank the other loses
        tensors[name] = tensor * (sizes[:, None] if "lora_A" in name else sizes)
    base = {name: tensor * 0 for name, tensor in state(0, torch.float32).items()}
    found, expected = over(tmp_path, base, tensors, r=rank), folded(base, tensors)
    difference = (found[f"{Q}.weight"].double() - expected[f"{Q}.weight"]).abs().max()
    assert difference <= 2e-6 * expected[f"{Q}.weight"].abs().max()


def spec_of(tmp_path: Path, rank: int, rows: int, columns: int, turned: bool) -> TensorSpec:
    base = {"h.0.c.weight": torch.randn(rows, columns, dtype=torch.float64)}  # rounding to float32 would hide too much
    write_folder(tmp_path / "base", base)
    shape = (columns, rows) if turned else (rows, columns)
    write_adapter(tmp_path / "adapter", lora("h.0.c", *shape, rank=rank), r=rank, fan_in_fan_out=turned)
    return open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").tensors["h.0.c.weight"]


def read(spec: TensorSpec, start: int, count: int) -> torch.Tensor:
    out = torch.empty(count, dtype=dtypes.torch_dtype(spec.dtype))
    with Reader() as reader:
        spec.read(reader, start, out)
    return out


@pytest.mark.parametrize("turned", [False, True])
@given(data=st.data())
@settings(max_examples=40, derandomize=True)
def test_any_cut_gives_the_same_bits(tmp_path_factory, turned, data):
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    rank = data.draw(st.integers(1, 9))
    torch.manual_seed(rank)
    spec = spec_of(tmp_path_factory.mktemp("cut"), rank, rows, columns, turned)
    with mock.patch.object(low_rank, "FACTOR", data.draw(st.sampled_from([1, 30, 1 << 19]))):
        whole = read(spec, 0, rows * columns)
        start = data.draw(st.integers(0, rows * columns - 1))
        count = data.draw(st.integers(1, rows * columns - start))
        with mock.patch.object(pieces, "PIECE", data.draw(st.integers(1, 200))):
            part = read(spec, start, count)
    assert bits(part) == bits(whole[start : start + count])


def test_many_threads_and_a_library_with_many_give_the_same_bits(tmp_path):
    torch.manual_seed(0)
    spec = spec_of(tmp_path, 24, 700, 900, False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = read(spec, 0, spec.numel)
        torch.set_num_threads(4)
        out = torch.empty_like(whole)
        with Reader() as reader:
            starts = range(0, spec.numel, 50_001)
            tasks = [threading.Thread(target=spec.read, args=(reader, s, out[s : s + 50_001])) for s in starts]
            for task in tasks:
                task.start()
            for task in tasks:
                task.join()
    finally:
        torch.set_num_threads(before)
    assert bits(out) == bits(whole)


def test_the_order_of_the_rank_does_not_show(tmp_path):
    """The products are summed exactly: turning the order round changes nothing."""
    base, tensors = {f"{Q}.weight": torch.zeros(50, 60).double()}, lora(Q, 50, 60, rank=64)
    turned = {name: tensor.flip(0 if "lora_A" in name else 1) for name, tensor in tensors.items()}
    one = over(tmp_path / "1", base, tensors, r=64)
    other = over(tmp_path / "2", base, turned, r=64)
    assert same_bytes(one[f"{Q}.weight"], other[f"{Q}.weight"])


def test_scales(tmp_path):
    base = state(0, torch.float32)
    tensors = lora(Q, 8, 8, rank=4) | lora(UP, 16, 8, rank=2, seed=1)
    patterns = {
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {r"layers\.1\.mlp\.(up|down)_proj": 3, "mlp.up_proj": 99},
    }
    for stabilised in (False, True):
        found = over(tmp_path / str(stabilised), base, tensors, use_rslora=stabilised, **patterns)
        root = math.sqrt if stabilised else float
        for module, scale in ((Q, 8 / root(4)), (UP, 3 / root(2))):
            a, b = (tensors[f"{PREFIX}{module}.lora_{letter}.weight"].double() for letter in "AB")
            expected = base[f"{module}.weight"].double() + scale * (b @ a)
            torch.testing.assert_close(found[f"{module}.weight"].double(), expected, rtol=1e-6, atol=1e-9)


def test_a_pattern_must_reach_from_a_dot_to_the_end(tmp_path):
    tensors = lora(Q, 8, 8)
    plain = over(tmp_path / "1", state(0), tensors)[f"{Q}.weight"]
    for number, pattern in enumerate(("proj", "self_attn", "0.self_attn.q_pro")):
        other = over(tmp_path / f"x{number}", state(0), tensors, alpha_pattern={pattern: 1})
        assert same_bytes(other[f"{Q}.weight"], plain)
    assert not same_bytes(over(tmp_path / "2", state(0), tensors, alpha_pattern={"q_proj": 1})[f"{Q}.weight"], plain)


def test_a_square_weight_is_turned_by_the_config_any_other_by_its_shape(tmp_path):
    a, b = torch.randn(4, 8), torch.randn(8, 4)
    tensors = {f"{PREFIX}{Q}.lora_A.weight": a, f"{PREFIX}{Q}.lora_B.weight": b}
    tensors |= lora("c", 5, 7)
    base = {f"{Q}.weight": torch.zeros(8, 8), "c.weight": torch.zeros(7, 5)}
    straight, turned = over(tmp_path / "1", base, tensors), over(tmp_path / "2", base, tensors, fan_in_fan_out=True)
    torch.testing.assert_close(straight[f"{Q}.weight"], 2 * b @ a)
    torch.testing.assert_close(turned[f"{Q}.weight"], (2 * b @ a).T)
    assert same_bytes(straight["c.weight"], turned["c.weight"])


def test_embeddings(tmp_path):
    base, name = state(0, torch.float32), "model.embed_tokens"
    a, b = torch.randn(4, 16), torch.randn(8, 4)
    tensors = {f"{PREFIX}{name}.lora_embedding_A": a, f"{PREFIX}{name}.lora_embedding_B": b}
    trained = torch.randn(16, 8)
    found = over(tmp_path / "1", base, tensors)[f"{name}.weight"]
    torch.testing.assert_close(found, base[f"{name}.weight"] + 2 * (b @ a).T)
    tensors[f"{PREFIX}{name}.base_layer.weight"] = trained
    torch.testing.assert_close(over(tmp_path / "2", base, tensors)[f"{name}.weight"], trained + 2 * (b @ a).T)


def test_full_tensors_replace_those_of_the_base(tmp_path):
    base, head, norm = state(0), torch.randn(16, 8), torch.randn(8).bfloat16()
    tensors = lora(Q, 8, 8) | {f"{PREFIX}lm_head.weight": head, f"{PREFIX}model.norm.weight": norm}
    tensors |= {f"{PREFIX}lm_head.original_module.weight": base["lm_head.weight"]}
    tensors |= {f"{PREFIX}lm_head.modules_to_save.weight": head.clone()}
    found = over(tmp_path, base, tensors)
    assert same_bytes(found["lm_head.weight"], head) and same_bytes(found["model.norm.weight"], norm)
    opened = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert opened.tensors["lm_head.weight"].written_as == "bfloat16"
    assert len(opened.files) == 2 and len(opened.added) == 1
    told = "".join(f"{name}: {why}\n" for name, why in opened.left_out.items())
    for part in ("lm_head.weight of the base: replaced", "original_module", "saved twice"):
        assert part in told


def test_a_tied_head_of_its_own(tmp_path):
    base = state(0, torch.float32)
    del base["lm_head.weight"]
    tensors = lora("lm_head", 16, 8)
    found, expected = (
        over(tmp_path / "1", base, tensors),
        folded(base | {"lm_head.weight": base["model.embed_tokens.weight"]}, tensors),
    )
    assert same_bytes(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    torch.testing.assert_close(found["lm_head.weight"].double(), expected["lm_head.weight"], rtol=1e-6, atol=1e-9)
    both = {f"{PREFIX}lm_head.weight": torch.ones(16, 8), f"{PREFIX}model.embed_tokens.weight": torch.zeros(16, 8)}
    found = over(tmp_path / "2", base, both)
    assert found["lm_head.weight"].all() and not found["model.embed_tokens.weight"].any()


@pytest.mark.parametrize("cut", ["transformer.", ""])
def test_a_front_that_only_one_has(tmp_path, cut):
    add = "" if cut else "transformer."
    base = {f"{add}h.{n}.c.weight": torch.zeros(4, 4) for n in range(2)}
    tensors = lora(f"{cut}h.0.c", 4, 4) | lora(f"{cut}h.1.c", 4, 4, seed=1)
    found = over(tmp_path, base, tensors)
    assert found.keys() == base.keys() and all(tensor.any() for tensor in found.values())


def test_over_dequantised_weights(tmp_path):
    codes = torch.randn(8, 8).to(torch.float8_e4m3fn)
    scale = torch.rand(8, 1)
    base = {f"{Q}.weight": codes, f"{Q}.weight_scale": scale}
    tensors = lora(Q, 8, 8)
    found = over(tmp_path, base, tensors)[f"{Q}.weight"]
    expected = folded({f"{Q}.weight": codes.float() * scale}, tensors)[f"{Q}.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-9)
    spec = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").tensors[f"{Q}.weight"]
    assert spec.quantised and spec.written_as == "bfloat16"


def test_a_header_that_puts_tensors_at_odd_bytes(tmp_path):
    base, tensors = {"c.weight": torch.zeros(6, 5)}, lora("c", 5, 6)
    write_adapter(tmp_path / "adapter", tensors)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :])
    write_folder(tmp_path / "base", base)
    found = read_all(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))["c.weight"]
    torch.testing.assert_close(
        found.double(), folded({"c.weight": torch.zeros(5, 6)}, tensors)["c.weight"].T, rtol=1e-6, atol=1e-9
    )


def test_paths_with_a_plus_of_their_own(tmp_path):
    base, adapter = write_folder(tmp_path / "a+b", state(0)), write_adapter(tmp_path / "c+d", lora(Q, 8, 8))
    assert not open_checkpoint(base).added
    opened = open_checkpoint(f"{base}+{adapter}")
    assert opened.paths == (base.resolve(), adapter.resolve())
    with pytest.raises(CheckpointError, match="no BASE"):
        open_checkpoint(f"{base}+{adapter}+{adapter}-gone")
    assert open_checkpoint(f"{base}+{adapter}:0.5+{adapter}:-2").paths == (base.resolve(), *[adapter.resolve()] * 2)
    with pytest.raises(CheckpointError, match=r"BASE\+"):
        open_checkpoint(adapter)


def test_an_adapter_alone_tells_its_factors(tmp_path):
    opened = open_adapter(str(write_adapter(tmp_path / "adapter", lora(Q, 8, 8))))
    [(name, factors)] = opened.factors.items()
    assert name == f"{Q}.weight" and factors.scale == 2
    assert (factors.a.shape, factors.b.shape) == ((4, 8), (8, 4))


def lengths(base: torch.Tensor, tensors: State, module: str, magnitude: torch.Tensor) -> torch.Tensor:
    """What a DoRA makes of a matrix, in float64."""
    rows = folded({f"{module}.weight": base}, tensors)[f"{module}.weight"]
    return magnitude.double()[:, None] * rows / rows.norm(dim=1, keepdim=True)


def test_rows_of_their_own_lengths(tmp_path):
    base, tensors, magnitude = state(0, torch.float32), lora(UP, 16, 8), torch.rand(16) + 0.5
    tensors[f"{PREFIX}{UP}.lora_magnitude_vector"] = magnitude
    found = over(tmp_path, base, tensors, use_dora=True)[f"{UP}.weight"]
    expected = lengths(base[f"{UP}.weight"], tensors, UP, magnitude)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    half = read_all(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}:0.5"))[f"{UP}.weight"]
    middle = (expected + base[f"{UP}.weight"].double()) / 2
    torch.testing.assert_close(half.double(), middle, rtol=1e-6, atol=1e-7)


def test_rows_of_single_tokens(tmp_path):
    """Whole rows are the adapter's to the bit, whatever was there; a scale moves them by a part of the difference."""
    base, rows = state(0, torch.float32), torch.tensor([[1e-30] * 8, [3e30] * 8])
    tensors = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    found = over(tmp_path, base, tensors, trainable_token_indices=[9, 2])["model.embed_tokens.weight"]
    expected = base["model.embed_tokens.weight"].clone()
    expected[[9, 2]] = rows
    assert same_bytes(found, expected)
    half = read_all(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}:0.5"))["model.embed_tokens.weight"]
    torch.testing.assert_close(half, (expected + base["model.embed_tokens.weight"]) / 2)


def test_rows_of_tokens_that_the_base_lacks(tmp_path):
    tensors = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(1, 8)}
    with pytest.raises(CheckpointError, match=r"has a row for token 16, but .* has 16 rows"):
        over(tmp_path, state(0), tensors, trainable_token_indices={"embed_tokens": [16]})


@pytest.mark.parametrize("version", ["0.21.2", "0.19.0", None])
@pytest.mark.parametrize("apart", [False, True])
def test_experts(version, apart, tmp_path):
    """The layout of the factors is the one of peft's ``ParamWrapper.get_delta_weight``, of each version."""
    up, down = torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    if apart:
        base = {f"l.experts.{n}.gate_proj.weight": up[n, :6].clone() for n in range(3)}
        base |= {f"l.experts.{n}.up_proj.weight": up[n, 6:].clone() for n in range(3)}
        base |= {f"l.experts.{n}.down_proj.weight": down[n].clone() for n in range(3)}
    else:
        base = {"l.experts.gate_up_proj": up, "l.experts.down_proj": down}
    meant = version == "0.21.2"
    inner = lora("l.experts.base_layer", *((12, 8) if meant else (8, 12)), rank=4 * 3)
    outer = lora("l.experts", *((8, 6) if meant else (6, 8)), rank=4 * 3, seed=1)
    changes = {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"], "peft_version": version}
    found = over(tmp_path, base, inner | outer, **changes)
    for whole, factors, name in ((up, inner, "gate_up_proj"), (down, outer, "down_proj")):
        a, b = factors.values()
        ending = "e o i" if meant else "e i o"
        delta = torch.einsum(f"o r e, e r i -> {ending}", b.reshape(len(b), 4, 3), a.reshape(3, 4, -1)) * 2
        if not apart:
            result = found[f"l.experts.{name}"]
        elif name == "down_proj":
            result = torch.stack([found[f"l.experts.{n}.down_proj.weight"] for n in range(3)])
        else:
            halves = [[found[f"l.experts.{n}.{part}_proj.weight"] for part in ("gate", "up")] for n in range(3)]
            result = torch.stack([torch.cat(each) for each in halves])
        torch.testing.assert_close(result, whole + delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", ["0.21.2", "0.19.0"])
def test_square_experts_are_turned_as_the_other_matrix_says(version, tmp_path):
    base = {"l.experts.gate_up_proj": torch.zeros(3, 8, 8), "l.experts.down_proj": torch.zeros(3, 8, 4)}
    tensors = lora("l.experts", 8, 8, rank=12)
    changes = {"target_parameters": ["experts.gate_up_proj"], "peft_version": version}
    found = over(tmp_path, base, tensors, **changes)["l.experts.gate_up_proj"]
    a, b = tensors.values()
    ending = "e o i" if version == "0.21.2" else "e i o"
    expected = torch.einsum(f"o r e, e r i -> {ending}", b.reshape(8, 4, 3), a.reshape(3, 4, 8)) * 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["experts", "lengths", "tokens"])
@given(data=st.data())
@settings(max_examples=15, derandomize=True)
def test_any_cut_of_other_terms_gives_the_same_bits(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("cut")
    rows, columns = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    torch.manual_seed(rows)
    name, base, tensors, changes = {
        "experts": (
            "l.experts.w",
            torch.randn(3, rows, columns + rows),
            lora("l.experts", rows, columns + rows, rank=12),
            {"target_parameters": ["experts.w"]},
        ),
        "lengths": (
            "l.weight",
            torch.randn(rows, columns),
            lora("l", rows, columns) | {f"{PREFIX}l.lora_magnitude_vector": torch.rand(rows)},
            {"use_dora": True},
        ),
        "tokens": (
            "l.weight",
            torch.randn(rows + 3, columns),
            {f"{PREFIX}l.token_adapter.trainable_tokens_delta": torch.randn(2, columns)},
            {"trainable_token_indices": {"l": [rows + 1, 0]}},
        ),
    }[kind]
    over(folder, {name: base}, tensors, **changes)
    spec = open_checkpoint(f"{folder / 'base'}+{folder / 'adapter'}").tensors[name]
    whole = read(spec, 0, spec.numel)
    start = data.draw(st.integers(0, spec.numel - 1))
    count = data.draw(st.integers(1, spec.numel - start))
    with (
        mock.patch.object(pieces, "PIECE", data.draw(st.integers(1, 200))),
        mock.patch.object(dora, "TOGETHER", data.draw(st.integers(1, 200))),
    ):
        part = read(spec, start, count)
    assert bits(part) == bits(whole[start : start + count])
