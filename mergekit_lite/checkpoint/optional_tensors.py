"""Tensors that a model can do without: loaders compute them, tie them, or leave them out.

The hub's files often have them, and the same model saved again by transformers doesn't.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from mergekit_lite.checkpoint import tied_weights
from mergekit_lite.checkpoint.tensor import TensorSpec

MODALITIES = ("vision_config", "audio_config")  # sections of a config, each of a tower with layers of its own
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids|attention\.bias)$")
MASKS = re.compile(r"(^|\.)attn\.bias$")  # GPT-2's, of shape (1, 1, n, n); elsewhere the bias of a layer
PREDICTION = re.compile(r"(^|\.)mtp(\.|$)")  # multi-token prediction as Qwen stores it
LAYER = re.compile(r"(?:model\.|language_model\.|transformer\.)*layers\.(\d+)\.")  # of text, not of a tower
COPIES = re.compile(r"(^|\.)((en|de)coder\.embed_tokens|proj_out)\.weight$")  # T5's and Whisper's, beside the embedding


def why_optional(
    name: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
) -> str | None:
    """Return why a model can do without a tensor that it has; None where it can't, as far as is known.

    Args:
        name: of the tensor.
        spec: the tensor.
        tensors: all tensors of the model.
        config: the model's, which says how many layers it has and whether it ties its embeddings.
    """
    if BUFFERS.search(name) or (MASKS.search(name) and len(spec.shape) > 2):
        return "a buffer, computed on loading"
    counted = layers_promised(config)
    layer = LAYER.match(name)
    if PREDICTION.search(name) or (counted and layer and int(layer[1]) >= counted):
        return "multi-token prediction, left out on loading"
    tied = (config or {}).get("tie_word_embeddings") is not False
    embeddings = [other for key, other in tensors.items() if tied_weights.is_embedding(key) and key != name]
    if COPIES.search(name) and tied and any(other.shape == spec.shape for other in embeddings):
        return "a copy of the embedding, tied on loading"
    return None


def modalities(config: Mapping[str, Any] | None) -> set[str]:
    """Return the sections of a config that promise a tower for something else than text."""
    return {key for key in MODALITIES if isinstance((config or {}).get(key), Mapping)}


def beginnings(names: Iterable[str]) -> frozenset[str]:
    """Return every name, and every part of it that ends with a dot."""
    return frozenset(name[:at] for name in names for at in (*_dots(name), len(name)))


def module_alone(name: str, known: Container[str]) -> str | None:
    """Return the module of a tensor that a model lacks as a whole: its shortest beginning that isn't known.

    ``known`` are the ``beginnings`` of all names of that model. None where the module is within a layer, or is an
    output head.
    """
    module = next((name[:end] for end in (*_dots(name), len(name)) if name[:end] not in known), "")
    within_layer = any(part.isdigit() for part in module.split("."))
    return None if not module or within_layer or tied_weights.is_head(name) else module


def _dots(name: str) -> list[int]:
    return [at for at, character in enumerate(name, 1) if character == "."]


def layers_promised(config: Mapping[str, Any] | None) -> int | None:
    """Return how many layers a config promises, its own or its text model's; None where it doesn't say."""
    config = config or {}
    text = config.get("text_config")
    for section in (text if isinstance(text, Mapping) else {}, config):
        for key in LAYER_COUNTS:
            if isinstance(count := section.get(key), int) and count > 0:
                return count
    return None
