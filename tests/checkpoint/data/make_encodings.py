"""Write the fixtures of stored encodings with the libraries that define them: the tensors, and the values they give.

Each file holds a small model's stored tensors and, under ``NAME expected``, what the library dequantises them to. Its
metadata has ``config``: the ``config.json`` that belongs to it. Written with compressed-tensors 0.20.1, bitsandbytes
0.50.2, nvidia-modelopt 0.47.0, transformers 5.23.0 and torch 2.13.0 on a CPU with AVX2; run in an environment that has
them: ``python make_encodings.py``. None is needed to test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
HERE = Path(__file__).parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def save(name: str, tensors: State, quantization: dict[str, Any], **config: Any) -> None:
    """Write a fixture with its config."""
    config = {"model_type": "tiny", "quantization_config": quantization, **config}
    tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
    save_file(tensors, HERE / f"{name}.safetensors", {"config": json.dumps(config)})


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return random values of every magnitude."""
    return (torch.randn(shape) * torch.randn((*shape[:-1], 1)).exp() * 0.05).to(dtype)


def make_bitsandbytes() -> None:
    """NF4 and FP4, with and without quantised scales, in three dtypes and odd shapes; LLM.int8."""
    from bitsandbytes import functional

    tensors: State = {}
    cases = [
        ("nf4", "bf16", (24, 48), True, torch.uint8),
        ("nf4", "fp16", (9, 33), False, torch.uint8),
        ("nf4", "bf16", (275, 60), True, torch.uint8),  # 258 scales: more than one block of them
        ("fp4", "bf16", (7, 66), True, torch.uint8),
        ("fp4", "fp32", (10, 48), False, torch.uint8),
        ("nf4", "bf16", (16, 64), True, torch.bfloat16),
    ]
    for number, (kind, dtype, shape, nested, storage) in enumerate(cases):
        name = f"{number}.{kind}.{dtype}.weight"
        codes, state = functional.quantize_4bit(
            weight(*shape, dtype=DTYPES[dtype]), blocksize=64, compress_statistics=nested, quant_type=kind,
            quant_storage=storage,
        )  # fmt: skip
        tensors |= {name: codes, f"{name} expected": functional.dequantize_4bit(codes, state)}
        tensors |= {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    codes, scale, _ = functional.int8_vectorwise_quant(weight(12, 33, dtype=torch.float16))
    tensors |= {"int8.weight": codes, "int8.SCB": scale, "int8.weight_format": torch.tensor(0, dtype=torch.uint8)}
    tensors["int8.weight expected"] = functional.int8_vectorwise_dequant(codes, scale)
    save("bitsandbytes", tensors, {"quant_method": "bitsandbytes"}, torch_dtype="bfloat16")


def make_mxfp4() -> None:
    """Two experts of gpt-oss, with every code and exponents of every size."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors: State = {}
    for name, shape in (("gate_up_proj", (2, 36, 3)), ("down_proj", (2, 24, 2))):
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(100, 130, shape, dtype=torch.uint8)
        scales[0, 0] = torch.tensor([0, 254, 127])[: shape[-1]]
        name = f"layers.0.mlp.experts.{name}"
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[f"{name} expected"] = convert_moe_packed_tensors(blocks, scales)
    save("mxfp4", tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, torch_dtype="bfloat16")


def make_modelopt() -> None:
    """NVFP4 with a power of two elements and an odd number of rows."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    tensors: State = {}
    for name, shape in (("a.weight", (7, 48)), ("b.weight", (16, 16))):
        packed, scale, scale_2 = NVFP4QTensor.quantize(weight(*shape, dtype=torch.bfloat16), 16)
        tensors |= {name: packed._quantized_data, f"{name}_scale": scale, f"{name}_scale_2": scale_2}
        sizes = {"scale": scale, "double_scale": scale_2, "block_sizes": {-1: 16}}
        tensors[f"{name} expected"] = packed.dequantize(dtype=torch.float32, **sizes)
    tensors["a.input_scale"] = torch.tensor(0.5)
    save("modelopt", tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, torch_dtype="bfloat16")


def make_compressed_tensors() -> None:
    """One file a format, with a group of the config for each layer."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def compressed(format: str, shape: tuple[int, int], dtype: str, **settings: Any) -> tuple[State, dict[str, Any]]:
        args = QuantizationArgs(**settings)
        values, strategy = weight(*shape, dtype=DTYPES[dtype]), args.strategy
        if strategy == "block":
            height, width = args.block_structure
            padded = torch.nn.functional.pad(values, (0, -shape[1] % width, 0, -shape[0] % height))
            cut = padded.view(padded.shape[0] // height, height, -1, width)
            least, most = cut.amin((1, 3)), cut.amax((1, 3))
        elif strategy in ("group", "tensor_group"):
            cut = values.view(shape[0], -1, args.group_size)
            least, most = cut.amin(-1), cut.amax(-1)
        elif strategy == "channel":
            least, most = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        else:
            least, most = values.min().view(1), values.max().view(1)
        general = {}
        if format == "nvfp4-pack-quantized":
            general["global_scale"] = (448 * 6 / values.abs().max().float()).view(1)
        scale, zero_point = calculate_qparams(least, most, args, **general)
        state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero_point}
        state |= {f"weight_{key}": value for key, value in general.items()}
        scheme = QuantizationScheme(targets=["x"], weights=args, format=format)
        compressor = BaseCompressor.get_value_from_registry(format)
        state = compressor.compress(state, scheme)
        return state | {"weight expected": compressor.decompress(state, scheme)["weight"]}, args.model_dump(mode="json")

    group, asymmetric = {"strategy": "group", "group_size": 32}, {"symmetric": False}
    files: dict[str, list[tuple[str, tuple[int, int], str, dict[str, Any]]]] = {
        "pack": [
            ("pack-quantized", (40, 64), "bf16", {"num_bits": 4, **group}),
            ("pack-quantized", (37, 64), "fp16", {"num_bits": 4, **group, **asymmetric}),
            ("pack-quantized", (9, 43), "fp32", {"num_bits": 4, "strategy": "channel", **asymmetric}),
            ("pack-quantized", (70, 96), "bf16", {"num_bits": 3, **group, **asymmetric}),
            ("pack-quantized", (9, 43), "fp32", {"num_bits": 8, "strategy": "channel"}),
            ("pack-quantized", (33, 45), "bf16", {"num_bits": 5, "strategy": "tensor"}),
            ("pack-quantized", (33, 45), "bf16", {"num_bits": 2, "strategy": "channel", **asymmetric}),
        ],
        "int8": [
            ("int-quantized", (12, 33), "bf16", {"num_bits": 8, "strategy": "channel"}),
            ("int-quantized", (12, 33), "fp16", {"num_bits": 8, "strategy": "channel", **asymmetric}),
            ("int-quantized", (12, 33), "fp32", {"num_bits": 8, "strategy": "tensor", **asymmetric}),
            ("int-quantized", (12, 64), "bf16", {"num_bits": 8, **group, **asymmetric}),
            ("naive-quantized", (12, 33), "bf16", {"num_bits": 4, "strategy": "block", "block_structure": [5, 8]}),
        ],
        "fp4": [
            ("nvfp4-pack-quantized", (7, 48), "bf16", {"strategy": "tensor_group", "group_size": 16}),
            ("nvfp4-pack-quantized", (32, 16), "fp32", {"strategy": "tensor_group", "group_size": 16}),
            ("mxfp4-pack-quantized", (7, 96), "bf16", {**group, "scale_dtype": "torch.uint8"}),
        ],
        "fp8": [
            ("float-quantized", (12, 33), "bf16", {"strategy": "tensor"}),
            ("float-quantized", (12, 33), "bf16", {"strategy": "channel"}),
            ("float-quantized", (12, 33), "fp32", {"strategy": "channel"}),
            ("float-quantized", (12, 64), "fp16", {**group}),
            ("float-quantized", (12, 33), "bf16", {"strategy": "block", "block_structure": [5, 8]}),
        ],
        "mxfp8": [("mxfp8-quantized", (12, 64), "bf16", {**group, "scale_dtype": "torch.uint8"})],
    }
    of_file = {"fp4": {"num_bits": 4, "type": "float"}, "fp8": {"num_bits": 8, "type": "float"}}
    of_file["mxfp8"] = of_file["fp8"]
    for file, cases in files.items():
        tensors, groups = {}, {}
        for number, (format, shape, dtype, settings) in enumerate(cases):
            state, weights = compressed(format, shape, dtype, **of_file.get(file, {}), **settings)
            tensors |= {f"layers.{number}.proj.{name}": value for name, value in state.items()}
            targets = [f"re:.*layers\\.{number}\\..*"] if number % 2 else [f"layers.{number}.proj"]
            groups[f"group_{number}"] = {"targets": targets, "weights": weights, "format": format}
        quantization = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
        if file == "mxfp8":
            quantization["format"] = "mxfp8-quantized"
        save(f"compressed_tensors_{file}", tensors, quantization, torch_dtype="bfloat16")


MAKERS: tuple[Callable[[], None], ...] = (make_bitsandbytes, make_mxfp4, make_compressed_tensors, make_modelopt)

if __name__ == "__main__":
    for make in MAKERS:
        torch.manual_seed(1)
        make()
