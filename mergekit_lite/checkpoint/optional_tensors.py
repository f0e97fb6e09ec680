"""Tensors that a model can do without: loaders compute them, tie them, or leave them out.

The hub's files often have them, and the same model saved again by transformers doesn't.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lite.checkpoint import tied_weights
from mergekit_lite.checkpoint.tensor import TensorSpec

MODALITIES = ("vision_config", "audio_config")  # sections of a config, each of a tower with layers of its own
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
BUFFERS = re.compile(r"(^|[./])(rotary_emb\.inv_freq|masked_bias|position_ids|attention\.bias)$")
MASKS = re.compile(r"(^|[./])attn\.bias$")  # GPT-2's, of shape (1, 1, n, n); elsewhere the bias of a layer
PREDICTION = re.compile(r"(^|[./])mtp(\.|$)")  # multi-token prediction as Qwen stores it
LAYER = re.compile(r"(?:.*/)?(?:model\.|language_model\.|transformer\.)*layers\.(\d+)\.")  # of text, not of a tower
HEADLESS = re.compile(r"(?<!Head)(?<!Heads)Model$|Classification$|QuestionAnswering$")  # GPT2LMHeadModel has one
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
    first = tied_weights.repeated_by(name, tensors, config)
    if tied_weights.COPIES.search(name) and first is not None and first.shape == spec.shape:
        return "a copy of the embedding, tied on loading"
    if VALUE_HEAD.match(name):
        return "a value head, which training alone reads"
    return None


def promises_head(config: Mapping[str, Any] | None) -> bool:
    """Return whether a model has a head for tokens by its class, or may have one, as that isn't known.

    A classifier, a reward model and a bare model that embeds texts have none, so that their embedding isn't tied.
    """
    classes = (config or {}).get("architectures")
    return not isinstance(classes, list) or not classes or not HEADLESS.search(str(classes[0]))


def modalities(config: Mapping[str, Any] | None) -> set[str]:
    """Return the sections of a config that promise a tower for something else than text."""
    return {key for key in MODALITIES if isinstance((config or {}).get(key), Mapping)}


def modules_alone(
    having: Iterable[str],
    config: Mapping[str, Any] | None,
    lacking: Iterable[str],
    its_config: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Return the modules that one of two models lacks as a whole, such as a vision tower, by their tensors' names.

    A module is the shortest beginning of a name that no name of the other model has. Those within layers don't count,
    nor do output heads.

    Args:
        having: names of the model that may have such modules.
        config: its config; they are looked for only where it promises a modality that the other's doesn't.
        lacking: names of the other model.
        its_config: the other's config.
    """
    if not modalities(config) - modalities(its_config):
        return {}
    known = {beginning for name in lacking for beginning in _beginnings(name)}
    modules = {name: next((each for each in _beginnings(name) if each not in known), "") for name in having}
    return {
        name: module.removesuffix(".")
        for name, module in modules.items()
        if module and not tied_weights.is_head(name) and not any(map(str.isdigit, module.split(".")))
    }


def _beginnings(name: str) -> list[str]:
    """Return the parts of a name that end with a dot, from the shortest one on, and the name."""
    return [name[:at] for at, character in enumerate(name, 1) if character == "."] + [name]


def layers_promised(config: Mapping[str, Any] | None) -> int | None:
    """Return how many layers a config promises, its own or its text model's; None where it doesn't say."""
    config = config or {}
    text = config.get("text_config")
    for section in (text if isinstance(text, Mapping) else {}, config):
        for key in LAYER_COUNTS:
            if isinstance(count := section.get(key), int) and count > 0:
                return count
    return None
