"""The output's config: where the models' configs disagree, and what becomes of the config where layers were moved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.optional_tensors import LAYER_COUNTS, MODALITIES, modalities
from mergekit_lite.checkpoint.parts import in_folder

LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers")  # lists of the layers that are special
# Settings that pick layers by their number and can't be carried over, with the value that picks none.
BY_NUMBER: Mapping[str, object] = {
    "attn_layer_offset": None, "attn_layer_period": None, "decoder_sparse_step": 1, "expert_layer_offset": None,
    "expert_layer_period": None, "first_k_dense_replace": 0, "full_attention_interval": None,
    "global_attn_every_n_layers": None, "interleave_moe_layer_step": 1, "max_window_layers": None, "moe_layer_freq": 1,
    "no_rope_layer_interval": None, "num_kv_shared_layers": 0, "num_nextn_predict_layers": 0,
    "sliding_window_pattern": None,
}  # fmt: skip

Config = Mapping[str, Any]
Origin = tuple[int, int]  # which of the inputs a layer is from, and its number there


def disagreements(keys: Sequence[str], inputs: Sequence[Checkpoint], config_source: int) -> list[str]:
    """Return where the inputs' configs differ from those that the output takes over."""
    reference = inputs[config_source].reference
    differing: list[str] = []
    for source in inputs:
        if source.stands_for:
            continue  # which section of the config is about that part isn't known
        for folder, config in inputs[config_source].configs.items():
            own, other = _comparable(config, source.configs.get(folder, {}))
            differing += [
                f"{in_folder(folder, key)}: {json.dumps(own[key])} in {reference}, {json.dumps(other[key])} in "
                f"{source.reference}"
                for key in keys
                if key in own
                and key in other
                and own[key] != other[key]
                # A Mistral in GGUF is a llama.
                and not (key == "model_type" and (source.config_made or inputs[config_source].config_made))
            ]
    return differing


def _comparable(one: Config, other: Config) -> tuple[Config, Config]:
    """Return what two configs say of the same things: of models with different towers, what they say of text."""
    if modalities(one) == modalities(other):
        return one, other
    sections = [dict(config["text_config"]) if "text_config" in config else dict(config) for config in (one, other)]
    for section in sections:
        section.pop("model_type", None)  # a text model has another type within and without
    return sections[0], sections[1]


def giving_config(inputs: Sequence[Checkpoint], number: int) -> tuple[int, list[str]]:
    """Return which of the inputs gives the config and what else lies beside weights, and what the user should know.

    It is input ``number``, or, where that is a bare GGUF, the first other one in a folder with a config.
    """
    source = inputs[number]
    if not source.config_made:
        return number, []
    for other, each in enumerate(inputs):
        if each.folder is not None and each.config is not None and not each.config_made:
            return other, [f"{source.reference} is a bare GGUF: config and tokenizer are those of {each.reference}"]
    remedy = f"AutoTokenizer.from_pretrained({str(source.path.parent)!r}, gguf_file={source.files[0].path.name!r})"
    missing = "tokenizer" if source.config is not None else "config and tokenizer"
    return number, [
        f"{source.reference} is a bare GGUF: {source.config_made}; no tokenizer is written. Put the original model's "
        f"{missing} beside the output, or save what transformers makes: {remedy}"
    ]


def recounted(
    config: Config, section: str, keys: Sequence[str], layers: int
) -> tuple[dict[str, Any], list[str]] | None:
    """Return a config that says of one part of the model, in a section or at its top, how many layers it has.

    And what the user should know of settings there that go by layers' numbers. None where it has none of the keys.
    """
    own = config.get(section, {}) if section else config
    if not isinstance(own, Mapping) or not any(key in own for key in keys):
        return None
    changed = dict(own) | {key: layers for key in keys if key in own}
    by_number = [key for key in own if key.endswith(("indexes", "indices"))] if section else []
    notes = [
        f"config: {section}.{key}: {json.dumps(own[key])} goes by the layers' numbers, and layers were moved: see "
        "whether it still says what is meant"
        for key in by_number
    ]
    return {**config, section: changed} if section else changed, notes


def relayered(
    inputs: Sequence[Checkpoint], config_source: int, layers: Sequence[Origin], own: Config | None = None
) -> tuple[Config | None, list[str]]:
    """Return the config for layers in another order, and what the user should know about it.

    Lists as long as the layers are many (``layer_types``) and lists of layers' numbers (``mlp_only_layers``) are made
    anew from the configs of the models that the layers come from; in nested text configs too. ``own`` is the config as
    far as it was changed already.
    """
    own = own or inputs[config_source].config
    if own is None:
        return None, []
    notes: list[str] = []
    configs = [source.config or {} for source in inputs]
    config = _section(own, configs, config_source, layers, notes)
    return config, [f"config: {note}" for note in notes]


def _section(
    own: Config, configs: Sequence[Config], config_source: int, layers: Sequence[Origin], notes: list[str]
) -> dict[str, Any]:
    """Return a config, or a nested one, made anew for the layers; ``configs`` are that section of each input's."""
    section = dict(own)
    moved = list(layers) != [(config_source, layer) for layer in range(len(layers))]
    for key, value in own.items():
        of_models = [config.get(key) for config in configs]
        if key in LAYER_COUNTS:
            section[key] = len(layers)
        elif isinstance(value, dict) and key.endswith("_config") and key not in MODALITIES:
            nested = [each if isinstance(each, dict) else {} for each in of_models]
            section[key] = _section(value, nested, config_source, layers, notes)
        elif key in LAYER_NUMBERS and isinstance(value, list) and moved:
            listed = [each if isinstance(each, list) else () for each in of_models]
            section[key] = [at for at, (model, layer) in enumerate(layers) if layer in listed[model]]
        elif _is_by_layer(key, value, own):
            section[key] = list(_by_layer(key, configs, config_source, layers, notes))
        elif moved and _picks_layers(key, value, own):
            notes.append(
                f"{key}: {json.dumps(value)} goes by the layers' numbers, and layers were moved: "
                "see whether it still says what is meant"
            )
    return section


def _is_by_layer(key: str, value: object, config: Config) -> bool:
    """Return whether a setting is a list with an entry for each layer."""
    counts = [config[name] for name in LAYER_COUNTS if name in config]
    ids = key == "architectures" or key.endswith(("token_id", "token_ids"))
    return isinstance(value, list) and len(value) in counts and not ids


def _by_layer(
    key: str, configs: Sequence[Config], config_source: int, layers: Sequence[Origin], notes: list[str]
) -> Iterator[object]:
    """Yield each layer's entry from its own model's config; where that has none, the config's own of that number."""
    lacking = 0
    for model, layer in layers:
        listed = configs[model].get(key)
        if isinstance(listed, list) and layer < len(listed):
            yield listed[layer]
        else:
            lacking += 1
            yield configs[config_source][key][min(layer, len(configs[config_source][key]) - 1)]
    if lacking:
        notes.append(f"{key}: the models of {lacking} moved layers don't list it: there the config's own entries stay")


def _picks_layers(key: str, value: object, config: Config) -> bool:
    """Return whether a setting picks layers by their number, and picks any."""
    if key not in BY_NUMBER or value is None or isinstance(value, list) or value == BY_NUMBER[key]:
        return False
    if key == "sliding_window_pattern" and "layer_types" in config:
        return False  # the list decides
    return key != "max_window_layers" or bool(config.get("use_sliding_window"))
