"""GGUF files: values are those of the ``gguf`` package, and models those that were converted.

``gguf_files`` converts as llama.cpp does; transformers, which reads some architectures itself, gives the same tensors.
"""

from __future__ import annotations

import json
import random
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.encodings import ggml, pieces
from mergekit_lite.checkpoint.formats import gguf as gguf_format
from mergekit_lite.checkpoint.gguf_models import ARCHITECTURES, MIXTRAL, _stored_names
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError, UsageError
from tests.checkpoint.gguf_files import State, add, add_values, write_gguf
from tests.checkpoint.reading import bits, read_all
from tests.models import read_folder, tuned, write_folder

LAYERS = 2
SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VALUES = {
    ".context_length": 64, ".block_count": LAYERS, ".embedding_length": 32, ".feed_forward_length": 64,
    ".attention.head_count": 4, ".attention.head_count_kv": 2, ".attention.layer_norm_rms_epsilon": 1e-6,
    ".rope.freq_base": 10000.0, ".vocab_size": 32, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.tokens": ["a"] * 32, "general.name": "tiny",
}  # fmt: skip
WIDE = {"head_dim": 16}
WIDE_VALUES = {".attention.key_length": 16, ".attention.value_length": 16}
EXPERT_VALUES = {".expert_count": 4, ".expert_used_count": 2}
# by architecture: the model's class, its own settings, the values of its header
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-6}, {".rope.dimension_count": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "rms_norm_eps": 1e-6}, EXPERT_VALUES | {".rope.freq_base": 1e6}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", WIDE, WIDE_VALUES),
    "qwen3moe": (
        "Qwen3Moe",
        WIDE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
        WIDE_VALUES | EXPERT_VALUES | {".expert_feed_forward_length": 24},
    ),
    "gemma": ("Gemma", WIDE, WIDE_VALUES),
    "gemma2": ("Gemma2", WIDE, WIDE_VALUES | {".attn_logit_softcapping": 50.0}),
    "gemma3": ("Gemma3Text", WIDE, WIDE_VALUES),
    "phi3": ("Phi3", {}, {}),
    "starcoder2": ("Starcoder2", {}, {}),
}
READ_BY_TRANSFORMERS = [name for name in MODELS if name not in ("mixtral", "gemma")]


def values_of(name: str) -> dict[str, Any]:
    return VALUES | MODELS[name][2]


def model(name: str, folder: Path, seed: int = 0) -> tuple[transformers.PreTrainedModel, State]:
    """A tiny model with random weights, saved by transformers; and its tensors as they are saved."""
    kind, settings, _ = MODELS[name]
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES | settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    made.save_pretrained(folder)
    return made.eval(), load_file(folder / "model.safetensors")


def tiny(path: Path, kind: str = "F32", seed: int = 0, **more: np.ndarray) -> tuple[Path, State]:
    """A Llama in GGUF, and the tensors it was made of; no library of models is needed for it."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 32), "model.norm.weight": (32,)}
    for layer in range(LAYERS):
        for module, rows in {"q": 32, "k": 16, "v": 16, "o": 32}.items():
            shapes[f"model.layers.{layer}.self_attn.{module}_proj.weight"] = (rows, 32)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (32,)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return write_gguf(path, "llama", state, VALUES, kind, **more), state


@pytest.mark.parametrize("kind", sorted(gguf.quants._type_traits, key=int), ids=lambda kind: kind.name)
def test_blocks_are_dequantised_as_by_the_library(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 5, 768
    stored = np.random.default_rng(kind).integers(0, 256, (rows, columns // elements * nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(stored, kind))
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    add_values(writer, "llama", VALUES)
    writer.add_tensor("blk.0.attn_v.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    spec = open_checkpoint(tmp_path / "q.gguf").tensors["model.layers.0.self_attn.v_proj.weight"]
    assert spec.shape == (rows, columns) and spec.stored_dtype in (kind.name, "bfloat16")
    chance = random.Random(int(kind))
    with Reader() as reader, mock.patch.object(ggml, "TOGETHER", 512), mock.patch.object(pieces, "PIECE", 1000):
        for start, count in [(0, spec.numel), *((chance.randrange(spec.numel), chance.randrange(900)) for _ in "abc")]:
            count = min(count, spec.numel - start)
            values = spec.elements(reader, start, count)
            assert bits(values.float()) == bits(expected.flatten()[start : start + count]), (start, count)


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_is_the_model(tmp_path: Path, name: str) -> None:
    original, state = model(name, tmp_path / "original")
    file = write_gguf(tmp_path / "m.gguf", "llama" if name == "mixtral" else name, state, values_of(name))
    checkpoint = open_checkpoint(file)
    read = read_all(checkpoint)
    assert read.keys() == state.keys()
    for key, tensor in state.items():
        plus_one = name.startswith("gemma") and key.endswith("norm.weight")
        assert bits(read[key]) == bits((tensor + 1) - 1 if plus_one else tensor), key
    if name in READ_BY_TRANSFORMERS:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="m.gguf", config=original.config, dtype=torch.float32
        ).state_dict()
        shared = [key for key in theirs if key in read]
        assert len(shared) >= len(read) - 12 * LAYERS * (name == "qwen3moe")  # whose experts transformers stacks
        assert all(torch.equal(theirs[key], read[key]) for key in shared)
    if checkpoint.config is not None:  # the config that is made of the header builds the same model
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "config.json").write_text(json.dumps(checkpoint.config))
        config = transformers.AutoConfig.from_pretrained(tmp_path / "made")
        again = transformers.AutoModelForCausalLM.from_config(config).eval()
        again.load_state_dict(original.state_dict())
        tokens = torch.arange(12)[None]
        assert torch.equal(again(tokens).logits, original(tokens).logits)


def test_every_architecture_is_tested_and_no_name_is_lost() -> None:
    assert MODELS.keys() == {*ARCHITECTURES, "mixtral"}
    for name, architecture in [*ARCHITECTURES.items(), ("llama", MIXTRAL)]:
        modules = len(architecture.modules) + len(architecture.experts) + 3 - (name in ("gemma", "gemma2"))
        assert len(set(_stored_names(name, architecture).values())) == 2 * modules, name


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_rows_are_put_right_in_any_piece(tmp_path: Path, heads: int) -> None:
    values = VALUES | {".attention.head_count": heads, ".attention.head_count_kv": heads}
    names = [f"model.layers.0.self_attn.{module}_proj.{end}" for module in "qk" for end in ("weight", "bias")]
    generator = torch.Generator().manual_seed(heads)
    state = {name: torch.randn((16, 32) if "weight" in name else 16, generator=generator) for name in names}
    tensors = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", state, values)).tensors
    chance = random.Random(heads)
    with Reader() as reader:
        for name, expected in state.items():
            for piece in (7, 100, 1 << 20):
                start = chance.randrange(expected.numel())
                count = chance.randrange(expected.numel() - start + 1)
                with mock.patch.object(pieces, "PIECE", piece):
                    run = tensors[name].elements(reader, start, count)
                assert torch.equal(run, expected.flatten()[start : start + count]), (name, start, count, piece)


def test_extrapolate_with_a_folder_and_verify(tmp_path: Path) -> None:
    file, state = tiny(tmp_path / "tuned.gguf", "F16")
    base = {name: tensor.bfloat16() for name, tensor in tuned(state, 1, rms=1e-2).items()}
    config = {"model_type": "mistral", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
    folder = write_folder(tmp_path / "base", base, config=config)
    (folder / "tokenizer.json").write_text("{}")
    plan = mergekit_lite.plan_extrapolation(folder, file, alpha=0.5, output=tmp_path / "out")
    assert any("a bare GGUF: config and tokenizer are those of" in note for note in plan.notes)
    mergekit_lite.run(plan)
    out = read_folder(tmp_path / "out")
    for name, tensor in state.items():
        aligned = (tensor.half() if tensor.dim() > 1 else tensor).double()
        exact = aligned + 0.5 * (aligned - base[name].double())
        assert torch.equal(out[name], exact.half()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert mergekit_lite.verify(tmp_path / "out").sound


def test_two_files_and_no_folder(tmp_path: Path) -> None:
    base, _ = tiny(tmp_path / "base.gguf", "Q8_0", seed=1)
    aligned, _ = tiny(tmp_path / "aligned.gguf", "Q8_0", seed=2)
    result = CliRunner().invoke(main, ["extrapolate", str(base), str(aligned), "-a", "0.5", "-o", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert "no tokenizer is written" in " ".join(result.output.split())
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("llama", "bfloat16")
    assert {tensor.dtype for tensor in read_folder(tmp_path / "o").values()} == {torch.bfloat16}
    shown = CliRunner().invoke(main, ["inspect", str(base)])
    assert shown.exit_code == 0 and "Q8_0" in shown.output
    with pytest.raises(UsageError, match="GGUF is read, but not written"):
        mergekit_lite.plan_extrapolation(base, aligned, alpha=0.5, output=tmp_path / "o.gguf")


def split(path: Path, folder: Path, parts: int) -> list[Path]:
    """Cut a GGUF as llama.cpp's ``gguf-split`` does: the model's values in the first part, a few in each."""
    reader = gguf.GGUFReader(path)
    files = []
    for number in range(parts):
        files.append(folder / f"m-{number + 1:05d}-of-{parts:05d}.gguf")
        writer = gguf.GGUFWriter(files[-1], "llama")
        add_values(writer, "llama", VALUES if number == 0 else {})
        for key, value in {"split.no": number, "split.count": parts}.items():
            writer.add_uint16(key, value)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::parts]:
            add(writer, tensor.name, np.array(tensor.data), tensor.tensor_type.name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


def test_parts(tmp_path: Path) -> None:
    whole, state = tiny(tmp_path / "whole.gguf")
    (tmp_path / "parts").mkdir()
    files = split(whole, tmp_path / "parts", 3)
    for reference in (tmp_path / "parts", files[0], files[2]):
        read = read_all(open_checkpoint(reference))
        assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    files[1].unlink()
    for reference in (tmp_path / "parts", files[0]):
        assert "missing; download them again" in refusal(reference)
    alone = files[0].rename(tmp_path / "parts" / "alone.gguf")
    assert "is one of 3 parts" in refusal(alone)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    return str(error.value)


def test_what_is_left_out_and_what_has_no_place(tmp_path: Path) -> None:
    file, state = tiny(tmp_path / "a.gguf", rope_freqs__weight=np.ones(4, np.float32))
    checkpoint = open_checkpoint(file)
    assert checkpoint.tensors.keys() == state.keys() and checkpoint.config is None
    assert "rotary frequencies" in checkpoint.left_out["rope_freqs.weight"]
    assert "rope_freqs.weight" in checkpoint.config_made
    file, _ = tiny(tmp_path / "b.gguf", cls__output__weight=np.ones((2, 32), np.float32))
    assert "no place\n" in refusal(file).replace(":", "\n") and "cls.output.weight" in refusal(file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.type": "adapter"}, "of the type 'adapter', not a model"),
        ({".attention.head_count": 5}, "no 5 heads"),
        ({".attention.head_count": [4, 4]}, "not a number of heads"),
    ],
)
def test_refused_models(tmp_path: Path, values: Mapping[str, Any], message: str) -> None:
    state = {"model.layers.0.self_attn.q_proj.weight": torch.ones(16, 32)}
    with mock.patch("tests.checkpoint.gguf_files.permuted", lambda array, heads: array):
        file = write_gguf(tmp_path / "m.gguf", "llama", state, VALUES | values)
    assert message in refusal(file)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    state = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    file = write_gguf(tmp_path / "m.gguf", "olmo2", state, VALUES)
    assert "architecture 'olmo2' isn't read" in refusal(file) and "qwen2" in refusal(file)


def test_without_the_library(tmp_path: Path) -> None:
    file, _ = tiny(tmp_path / "m.gguf")
    with mock.patch.dict(sys.modules, {"gguf": None}):
        assert "pip install 'mergekit-lite[gguf]'" in refusal(file)


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    print(f"seed {seed}")
    file, _ = tiny(tmp_path / "m.gguf", "Q8_0")
    sound = file.read_bytes()
    header = len(sound) - sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
    numbers = (0, 1, 2, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
    for case in range(400):
        content = bytearray(sound)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(min(header, len(content) - 1))
            match chance.randrange(4):
                case 0:
                    content[at] ^= 1 << chance.randrange(8)
                case 1:
                    content[at : at + 8] = struct.pack("<Q", chance.choice(numbers))
                case 2:
                    content[at : at + 4] = struct.pack("<I", chance.choice(numbers) & 0xFFFFFFFF)
                case _:
                    del content[at : at + chance.choice((1, 4, 8))]
        file.write_bytes(content)
        try:
            checkpoint = open_checkpoint(file)
            with Reader() as reader:
                for spec in checkpoint.tensors.values():
                    spec.elements(reader, 0, spec.numel)
        except CheckpointError as error:
            assert str(file) in str(error) or "gguf package" in str(error), case


@pytest.mark.parametrize("cut", [0, 3, 10, 30, 200, -1])
def test_files_cut_short(tmp_path: Path, cut: int) -> None:
    file, _ = tiny(tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[: cut if cut >= 0 else -100])
    assert re.search("cut short", refusal(file))


def test_claims_cost_no_memory(tmp_path: Path) -> None:
    """An array that claims more texts than the file has room for, and a text longer than the file."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for value in (struct.pack("<IIQ", 9, 8, 1 << 60), struct.pack("<IQ", 8, 1 << 60), struct.pack("<IIQ", 9, 9, 1)):
        (tmp_path / "m.gguf").write_bytes(start + value + bytes(64))
        assert "damaged or forged" in refusal(tmp_path / "m.gguf")


def test_plain_types_are_dtypes() -> None:
    for name, dtype in gguf_format.PLAIN_TYPES.items():
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
        assert torch.empty(0, dtype=getattr(torch, dtype)).element_size() == size
