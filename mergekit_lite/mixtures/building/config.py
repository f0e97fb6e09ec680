"""The config of a mixture: that of its dense base, under the family's keys, saying all that the base's left unsaid.

A key that a config lacks has a default, and the mixture's class may have another than the base's: such defaults are
written. So a mixture of equal experts is the base to the last setting, its sliding window included (mergekit drops it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lite.mixtures.families import Family

QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
IN_LLAMA = {"bos_token_id": 1, "eos_token_id": 2}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {  # of the classes of dense models, where those of mixtures differ
    "llama": {"max_position_embeddings": 2048, **IN_LLAMA},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, **IN_LLAMA},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50279},
}
THETA = 10000.0  # of all of them
WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
NOT_OF_MIXTURES = ("auto_map", "mlp_bias", "attention_bias", "quantization_config", "transformers_version")
ROPE = ("rope_theta", "rope_parameters", "rope_scaling")

Config = Mapping[str, Any]


def mixture_config(
    family: Family, base: Config, *, experts: int, per_token: int, width: int, shared: Sequence[int], has_bias: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the config of a mixture, and what the user should know of it.

    Args:
        family: of the mixture.
        base: the config of the dense model that gives all but the experts.
        experts: their number.
        per_token: how many of them a token goes through.
        width: of an expert.
        shared: the width of each shared expert.
        has_bias: whether the base's attention has biases.
    """
    kind = str(base.get("model_type", ""))
    unsaid: dict[str, Any] = {
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **DEFAULTS[kind],
    }
    window = unsaid.pop("sliding_window", None)
    config = {key: value for key, value in (unsaid | dict(base)).items() if key not in (*NOT_OF_MIXTURES, *WINDOW)}
    config["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    if "rope_theta" not in base and not isinstance(base.get("rope_parameters"), Mapping):
        config["rope_theta"] = THETA
    if config.get("head_dim", 0) is None:
        del config["head_dim"]  # classes that ask whether there is one take this for one
    windows, notes = _windows(family, base, window)
    config |= windows
    config |= {"model_type": family.model_type, "architectures": [family.architecture]}
    config |= {family.experts: experts, family.per_token: per_token}
    config |= {"intermediate_size": width, family.width: width, **family.dense_layers}
    if family.norm_topk_prob is None:
        config["norm_topk_prob"] = True  # the weights of the chosen experts sum to 1
    if family.shared_width:
        config[family.shared_width] = sum(shared)
    if family.shared_count:
        config[family.shared_count] = len(shared) or None
    if family.bias == "config":
        config["attention_bias"] = has_bias
    config |= family.settings
    if family.own_code:
        config["auto_map"] = dict(family.own_code)
    return config, notes


def _windows(family: Family, base: Config, default: int | None) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of sliding windows that give each layer the attention that it has in the base."""
    size = base.get("sliding_window", default)
    is_local = _are_local(base) if size else [False] * int(base["num_hidden_layers"])
    some, every = any(is_local), all(is_local)
    if family.model_type == "mixtral":
        settings: dict[str, Any] = {"sliding_window": size if every else None}
    elif family.model_type == "qwen3_moe":
        settings = {"use_sliding_window": every, "sliding_window": size if every else None}
    elif family.model_type == "qwen2_moe":
        # Its own rule for max_window_layers is another than Qwen2's: the list decides.
        types = ["sliding_attention" if local else "full_attention" for local in is_local]
        listed = {"layer_types": types, "max_window_layers": len(types)} if some else {}
        settings = {"use_sliding_window": some, "sliding_window": size if some else None, **listed}
    else:
        settings = {}
    if not some or settings.get("sliding_window"):
        return settings, []
    lost = f"{sum(is_local)} of {len(is_local)} layers of the base look back {size:,} tokens at most"
    return settings, [f"{lost}, which {family.title} can't say: on longer texts they look further back"]


def _are_local(base: Config) -> list[bool]:
    """Return for each layer of a dense model that has a window whether it looks through that."""
    layers, kind = range(int(base["num_hidden_layers"])), base.get("model_type")
    if kind == "mistral":
        return [True for _ in layers]
    if kind not in ("qwen2", "qwen3") or not base.get("use_sliding_window"):
        return [False for _ in layers]
    if isinstance(listed := base.get("layer_types"), list):
        return [entry == "sliding_attention" for entry in listed]
    return [layer >= base.get("max_window_layers", 28) for layer in layers]
