"""Recognise weights that MLX quantised, by ``quantization`` in ``config.json`` and by the tensors beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.affine import Affine
from mergekit_lite.checkpoint.schemes.scheme import Quantised, Stored, quantised
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError

WEIGHT, SCALES, BIASES = "weight", "scales", "biases"
BITS = (2, 3, 4, 5, 6, 8)
WORD = 32  # bits


def recognise(stored: Stored) -> Iterator[Quantised]:
    """Yield the weights of packed codes."""
    for name, spec in stored.tensors.items():
        layer = name.removesuffix(WEIGHT)
        if spec.dtype != "uint32" or layer == name or layer + SCALES not in stored.tensors:
            continue
        parts = {layer + part: part for part in (SCALES, BIASES) if layer + part in stored.tensors}
        yield quantised(name, parts, lambda spec=spec: _shown(spec, stored))  # type: ignore[misc]


def _shown(spec: TensorSpec, stored: Stored) -> TensorSpec:
    encoding = _encoding(
        spec, stored.tensors, _settings(stored.config, spec.name.removesuffix(WEIGHT).removesuffix("."))
    )
    shape = (*encoding.scale.shape[:-1], encoding.scale.shape[-1] * encoding.group)
    return replace(spec, dtype=encoding.scale.dtype, shape=shape, encoding=encoding)


def _settings(config: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """Return what the config says of a layer's quantisation: the layer's own entry goes before the general one."""
    general = config.get("quantization")
    if not isinstance(general, Mapping):
        return {}
    own = general.get(layer)
    return {**general, **own} if isinstance(own, Mapping) else general


def _encoding(spec: TensorSpec, tensors: Mapping[str, TensorSpec], settings: Mapping[str, Any]) -> Affine:
    """Return how a weight is stored. Raises CheckpointError where that isn't clear, or its parts don't fit."""
    layer = spec.name.removesuffix(WEIGHT)
    if (mode := settings.get("mode", "affine")) != "affine" or layer + BIASES not in tensors:
        named = f"quantised in the mode {mode!r} of MLX" if mode != "affine" else f"has no {layer + BIASES}"
        raise CheckpointError(f"{spec.name}: {named}, which isn't read. Use the checkpoint that it was made from.")
    bits, group = settings.get("bits"), settings.get("group_size")
    if bits not in BITS or not isinstance(group, int) or group < 8 or group % 8:
        raise CheckpointError(
            f"{spec.name}: codes in uint32 with scales, as MLX writes them, but 'quantization' of config.json doesn't "
            f"give their bits ({', '.join(map(str, BITS))}) and group_size: got {bits!r} and {group!r}. "
            "If the weights are in another folder than their config, put them together."
        )
    scale, bias = tensors[layer + SCALES], tensors[layer + BIASES]
    columns = scale.shape[-1] * group if scale.shape else 0
    expected = (*scale.shape[:-1], columns * bits // WORD)
    plain = all(part.is_plain for part in (spec, scale, bias)) and dtypes.is_float(scale.dtype)
    if len(scale.shape) < 2 or bias.shape != scale.shape or bias.dtype != scale.dtype or not plain:
        raise CheckpointError(
            f"{spec.name}: its scales {scale.dtype} {scale.shape} and biases {bias.dtype} {bias.shape} should be "
            "floats of one dtype and shape."
        )
    if columns * bits % WORD or spec.shape != expected:
        raise CheckpointError(
            f"{spec.name}: has shape {spec.shape}, which doesn't fit {bits} bits in groups of {group} and scales of "
            f"{scale.shape}: expected {expected}. Is 'quantization' of config.json that of these weights?"
        )
    return Affine(spec, scale, bias, bits, group, scheme="MLX")
