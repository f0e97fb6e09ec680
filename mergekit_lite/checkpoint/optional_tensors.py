"""Tensors that a model can do without: loaders compute them, tie them, or leave them out.

The hub's files often have them, and the same model saved again by transformers doesn't.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergekit_lite.checkpoint import tied_weights
from mergekit_lite.checkpoint.tensor import TensorSpec

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
BUFFERS = re.compile(r"(^|[./])(rotary_emb\.inv_freq|masked_bias|position_ids|attention\.bias)$")
MASKS = re.compile(r"(^|[./])attn\.bias$")  # GPT-2's, of shape (1, 1, n, n); elsewhere the bias of a layer
PREDICTION = re.compile(r"(^|[./])mtp(\.|$)")  # multi-token prediction as Qwen stores it
LAYER = re.compile(r"(?:.*/)?(?:model\.|language_model\.|transformer\.)*layers\.(\d+)\.")  # of text, not of a tower
# T5's and Whisper's copies, beside the embedding.
COPIES = re.compile(r"(^|[./])((en|de)coder\.embed_tokens|proj_out)\.weight$")
VALUE_HEAD = re.compile(r"v_head\.")  # of TRL's models with a value head


def why_optional(
    name: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
) -> str | None:
    """Return why a model can do without a tensor that it has; None where it can't, as far as is known.

    Args:
        name: of the tensor.
        spec: the tensor.
        tensors: all tensors of the model.
        config: that of the tensor's part of the model, which says how many layers it has and whether it ties its
            embeddings.
    """
    if BUFFERS.search(name) or (MASKS.search(name) and len(spec.shape) > 2):
        return "a buffer, computed on loading"
    counted = layers_promised(config)
    layer = LAYER.match(name)
    if PREDICTION.search(name) or (counted and layer and int(layer[1]) >= counted):
        return "multi-token prediction, left out on loading"
    tied = (config or {}).get("tie_word_embeddings") is not False
    embeddings = [
        other
        for key, other in tensors.items()
        if tied_weights.is_embedding(key) and key != name and tied_weights.part(key) == tied_weights.part(name)
    ]
    if COPIES.search(name) and tied and any(other.shape == spec.shape for other in embeddings):
        return "a copy of the embedding, tied on loading"
    if VALUE_HEAD.match(name):
        return "a value head, which training alone reads"
    return None


def layers_promised(config: Mapping[str, Any] | None) -> int | None:
    """Return how many layers a config promises, its own or its text model's; None where it doesn't say."""
    config = config or {}
    text = config.get("text_config")
    for section in (text if isinstance(text, Mapping) else {}, config):
        for key in LAYER_COUNTS:
            if isinstance(count := section.get(key), int) and count > 0:
                return count
    return None
