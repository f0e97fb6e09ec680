"""Quantised tensors that are recognised only to be refused: schemes by name, codes and scales that belong to nothing.

A refused scheme is known by the endings of the tensors that only it stores, or by ``quant_method`` in ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mergekit_lite.checkpoint.schemes.scheme import ORIGINAL, Quantised, Stored
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import counted

SUPPORTED_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "bitsandbytes", "mxfp4")
INTEGER_CODES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
NO_CODES = re.compile(r"(^|\.)(bias|position_ids|\w*mask\w*|\w*_index)$")  # GPT-2's attn.bias is a mask of bytes
FLOAT_CODES = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
SHOWN = "refused"  # what further tensors of a refused scheme are: nobody sees it


class RefusedScheme(NamedTuple):
    """One refused scheme: its name, a pattern of its tensors' endings, and what to do beside using the original."""

    name: str
    ending: str
    remedy: str = ""


SCHEMES = (
    RefusedScheme(
        "bitsandbytes (NF4, FP4 or LLM.int8) without its weight",
        r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.|\.SCB$",
        ", or load it with transformers, call model.dequantize(), and save it",
    ),
    RefusedScheme(
        "GPTQ or AWQ",
        r"\.(qweight|qzeros|g_idx)$",
        ", or dequantise it with GPTQModel (AWQ: AutoAWQ) and save it as bfloat16",
    ),
    RefusedScheme("NVFP4 in a layout that isn't read", r"weight_(scale_2|global_scale)$"),
    RefusedScheme("compressed-tensors with sparse weights", r"\.(bitmask|row_offsets)$"),
    RefusedScheme("HQQ", r"\.W_q$"),
    RefusedScheme("AQLM", r"\.codebooks$"),
    RefusedScheme("quanto", r"\.weight\._(data|scale)$"),
    RefusedScheme("torchao", r"_weight_qdata$"),
)
ANY_SCHEME = re.compile("|".join(known.ending for known in SCHEMES))
SCALE_ENDINGS = ("_scale", "_scale_inv", "_scales", "_scale_2")


def by_name(stored: Stored) -> Iterator[Quantised]:
    """Yield the tensors of each refused scheme, with a line that has their number, an example and the remedy.

    A method that is not supported refuses nothing by itself: tensors that are all plain floats are values, whatever
    ``config.json`` has kept of an earlier life.
    """
    names_by_scheme: dict[tuple[str, str], list[str]] = {}
    method = stored.method
    for name, spec in stored.tensors.items():
        if scheme := _scheme_of(spec):
            names_by_scheme.setdefault(scheme, []).append(name)
    # Further tensors of these layers (scales, shapes, nested tables) are named with them.
    named = {name.rpartition(".")[0] for names in names_by_scheme.values() for name in names}
    named |= {layer.removesuffix(".weight").removesuffix(".nested") for layer in named}
    further = {name: SHOWN for name in stored.tensors if named and name.rpartition(".")[0] in named}
    for name, spec in stored.tensors.items():
        if name not in further and (codes := _codes_of(spec, stored.tensors, method)):
            names_by_scheme.setdefault(codes, []).append(name)
            further |= dict.fromkeys(_scales_of(name, stored.tensors), SHOWN)
    for (title, remedy), names in names_by_scheme.items():
        problem = f"{title}: {counted(len(names), 'tensor')}, such as {names[0]}. {remedy}."
        yield Quantised(names[0], {**dict.fromkeys(names[1:], SHOWN), **further}, problem)


def strays(stored: Stored) -> Iterator[Quantised]:
    """Yield each tensor that is a scale by its name or dtype, but of no codes."""
    for name, spec in stored.tensors.items():
        if problem := _stray(spec, stored.tensors):
            yield Quantised(name, {}, problem)


def _scheme_of(spec: TensorSpec) -> tuple[str, str] | None:
    """Return the scheme that a tensor's name shows, and its remedy."""
    for known in SCHEMES if ANY_SCHEME.search(spec.name) else ():
        if re.search(known.ending, spec.name):
            return known.name, ORIGINAL + known.remedy
    return None


def _codes_of(spec: TensorSpec, tensors: Mapping[str, TensorSpec], method: str | None) -> tuple[str, str] | None:
    """Return what a tensor of codes is, by what stands beside it or in the config, and the remedy."""
    integers = _may_be_codes(spec)
    if integers and _scales_of(spec.name, tensors):
        return "integer codes with a scale (int8 or packed)", ORIGINAL
    if (integers or spec.dtype in FLOAT_CODES) and method is not None and method not in SUPPORTED_METHODS:
        return f"quant_method {method!r} of config.json", ORIGINAL
    return None


def unclaimed(stored: Stored) -> Iterator[Quantised]:
    """Yield the tensors that may be codes and that no scheme has recognised, with one line."""
    names = [name for name, spec in stored.tensors.items() if _may_be_codes(spec)]
    if names:
        example = stored.tensors[names[0]]
        problem = (
            f"whole numbers where weights should be, as codes of quantised weights are, in no scheme that is known: "
            f"{counted(len(names), 'tensor')}, such as {names[0]} ({example.dtype}, {example.shape}). {ORIGINAL}."
        )
        yield Quantised(names[0], dict.fromkeys(names[1:], SHOWN), problem)


def _stray(spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
    """Return what is wrong with a tensor that is a scale by its name or dtype, but of no codes; else None."""
    for ending in ("_scale_inv", ".weight_scale"):
        if spec.name.endswith(ending):
            weight = tensors.get(spec.name.removesuffix("_inv").removesuffix("_scale"))
            if weight is None:
                return f"{spec.name}: is the scale of a weight that isn't here. Name the whole folder, or remove it."
            return (
                f"{spec.name}: is a scale, but {weight.name} is plain {weight.dtype}; it is not clear whether it is "
                f"applied already. Remove the scale if it is; else {ORIGINAL.lower()}."
            )
    if spec.dtype == "float8_e8m0fnu":
        return f"{spec.name}: holds scales (float8_e8m0fnu) of an unknown scheme. {ORIGINAL}."
    return None


def _may_be_codes(spec: TensorSpec) -> bool:
    """Return whether a tensor may hold codes: whole numbers in two axes, or named as a weight, in any shape.

    Other vectors are counters and the like, int64 and bool positions and masks. A single column of bytes is packed.
    """
    if spec.dtype not in INTEGER_CODES or NO_CODES.search(spec.name) or spec.numel < 2:
        return False
    rows, columns = (1, 1, *spec.shape)[-2:]
    return spec.name.endswith("weight") or (rows > 1 and (columns > 1 or spec.dtype in ("int8", "uint8")))


def _scales_of(name: str, tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Return the names of the scales that a tensor has, by every way of naming them."""
    names = [name + ending for ending in SCALE_ENDINGS]
    names += [name.removesuffix("weight") + "scale"] if name.endswith(".weight") else []
    return [scale for scale in names if scale in tensors]
