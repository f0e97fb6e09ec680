"""Quantisation schemes that are recognised only to be refused by name: their codes are packed, or need tables.

Each is known by the endings of the tensors that only it stores, and by ``quant_method`` in ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import counted

SUPPORTED_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
INTEGER_CODES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
NO_CODES = re.compile(r"(^|\.)(bias|position_ids|\w*mask\w*|\w*_index)$")  # GPT-2's attn.bias is a mask of bytes
FLOAT_CODES = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
ORIGINAL = "Use the checkpoint that it was made from"


class Scheme(NamedTuple):
    """One refused scheme: its name, a pattern of its tensors' endings, and what to do beside using the original."""

    name: str
    ending: str
    remedy: str = ""


SCHEMES = (
    Scheme(
        "bitsandbytes (NF4, FP4 or LLM.int8)",
        r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.|\.SCB$",
        ", or load it with transformers, call model.dequantize(), and save it",
    ),
    Scheme(
        "GPTQ or AWQ",
        r"\.(qweight|qzeros|g_idx)$",
        ", or dequantise it with GPTQModel (AWQ: AutoAWQ) and save it as bfloat16",
    ),
    Scheme("MXFP4", r"_blocks$", ", or load it with transformers and Mxfp4Config(dequantize=True), and save it"),
    Scheme("NVFP4", r"weight_(scale_2|global_scale)$", ": 4-bit codes with two levels of scales aren't read"),
    Scheme(
        "compressed-tensors with packed weights (int4 or int8)",
        r"\.weight_packed$",
        ", or load it with transformers and CompressedTensorsConfig(run_compressed=False), and save it",
    ),
    Scheme("HQQ", r"\.W_q$"),
    Scheme("AQLM", r"\.codebooks$"),
    Scheme("quanto", r"\.weight\._(data|scale)$"),
    Scheme("torchao", r"_weight_qdata$"),
)
ANY_SCHEME = re.compile("|".join(known.ending for known in SCHEMES))
SCALE_ENDINGS = ("_scale", "_scale_inv", "_scales", "_scale_2")


def refusals(tensors: Mapping[str, TensorSpec], method: str | None) -> list[str]:
    """Return a line for each refused scheme that the tensors are in, with their number, an example and the remedy.

    A ``method`` that is not supported refuses nothing by itself: tensors that are all plain floats are values, whatever
    ``config.json`` has kept of an earlier life.
    """
    names_by_scheme: dict[tuple[str, str], list[str]] = {}
    for name, spec in tensors.items():
        if scheme := _scheme_of(spec):
            names_by_scheme.setdefault(scheme, []).append(name)
    # Further tensors of these layers (scales, shapes, nested tables) are named with them.
    named = {name.rpartition(".")[0] for names in names_by_scheme.values() for name in names}
    named |= {layer.removesuffix(".weight").removesuffix(".nested") for layer in named}
    for name, spec in tensors.items():
        if name.rpartition(".")[0] not in named and (codes := _codes_of(spec, tensors, method)):
            names_by_scheme.setdefault(codes, []).append(name)
    return [
        f"{title}: {counted(len(names), 'tensor')}, such as {names[0]}. {remedy}."
        for (title, remedy), names in names_by_scheme.items()
    ]


def _scheme_of(spec: TensorSpec) -> tuple[str, str] | None:
    """Return the scheme that a tensor's name shows, and its remedy."""
    for known in SCHEMES if ANY_SCHEME.search(spec.name) else ():
        if re.search(known.ending, spec.name) and (known.name != "MXFP4" or spec.dtype == "uint8"):
            return known.name, ORIGINAL + known.remedy
    return None


def _codes_of(spec: TensorSpec, tensors: Mapping[str, TensorSpec], method: str | None) -> tuple[str, str] | None:
    """Return what a tensor of codes is, by what stands beside it or in the config, and the remedy."""
    integers = _may_be_codes(spec)
    if integers and _has_scale(spec.name, tensors):
        return "integer codes with a scale (int8 or packed)", ORIGINAL
    if (integers or spec.dtype in FLOAT_CODES) and method is not None and method not in SUPPORTED_METHODS:
        return f"quant_method {method!r} of config.json", ORIGINAL
    return None


def unclaimed(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Return a line for the tensors that may be codes and that no encoding has claimed; none where there are none."""
    names = [name for name, spec in tensors.items() if _may_be_codes(spec)]
    if not names:
        return []
    example = tensors[names[0]]
    return [
        f"whole numbers in two axes, as codes of quantised weights are, in no scheme that is known: "
        f"{counted(len(names), 'tensor')}, such as {names[0]} ({example.dtype}, {example.shape}). {ORIGINAL}."
    ]


def _may_be_codes(spec: TensorSpec) -> bool:
    """Return whether a tensor may hold codes: vectors are counters and the like, int64 and bool positions and masks."""
    return (
        spec.dtype in INTEGER_CODES
        and len(spec.shape) >= 2
        and min(spec.shape[-2:]) > 1
        and not NO_CODES.search(spec.name)
    )


def _has_scale(name: str, tensors: Mapping[str, TensorSpec]) -> bool:
    return any(name + ending in tensors for ending in SCALE_ENDINGS) or (
        name.endswith(".weight") and name.removesuffix("weight") + "scale" in tensors
    )
