"""A checkpoint under the names that transformers loads: ``hf:STEP``, ``hf=CONFIG:STEP``.

What wrappers of a trainer put before a name is taken away (``_orig_mod.``, ``module.`` …), and the names of Meta's
Llama, which torchtitan uses, become those of transformers, with the rows of queries and keys in its order. The config
has to lie beside the checkpoint, or in a folder that the reference names: without it the output wouldn't load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint.encodings.converted import InterleavedHeads
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError, listing
from mergekit_lite.input_files import read_json

CONFIG = "config.json"
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MODULE, MODEL = "module.", "model."
LAYER = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.")
LLAMA = {  # Meta's and torchtitan's names of a Llama, with transformers' for them
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LLAMA_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ROTATED = ("attention.wq", "attention.wk")
OF_LAYER = re.compile(r"layers\.(?P<layer>\d+)\.(?P<part>[\w.]+)\.weight")


def config_folder(path: Path, named: str) -> Path:
    """Return the folder with the config: the named one, or that of the checkpoint, or one of the two above.

    Raises CheckpointError where there is no config.
    """
    places = [Path(named).expanduser().resolve()] if named else [path, *path.parents[:2]]
    for place in places:
        if (place / CONFIG).is_file():
            return place
    raise CheckpointError(
        f"{named or path}: has no {CONFIG}{'' if named else ' in it or above it'}. Copy the model's config and "
        f"tokenizer there, or name a folder that has them: hf=FOLDER:{path}"
    )


def under_transformers_names(
    path: Path, tensors: Mapping[str, TensorSpec], home: Path
) -> tuple[dict[str, TensorSpec], dict[str, Any]]:
    """Return the tensors under the names that transformers loads, and the config of the folder ``home``.

    Raises CheckpointError where the names don't map, or there are other layers than the config says.
    """
    config = read_json(folders.inside(home, CONFIG))
    bare = {WRAPPERS.sub("", name.removeprefix(MODULE)): spec for name, spec in tensors.items()}
    if len(bare) < len(tensors):
        raise CheckpointError(
            f"{path}: has tensors whose names differ in wrappers alone; it is not clear which are meant."
        )
    if "tok_embeddings.weight" in bare:
        renamed = _of_llama(path, bare, config)
    elif any(name.startswith(MODEL + MODEL) for name in bare) and all(name.startswith(MODEL) for name in bare):
        renamed = {name.removeprefix(MODEL): spec for name, spec in bare.items()}
    else:
        renamed = bare
    layers = {int(match["layer"]) for name in renamed if (match := LAYER.search(name))}
    promised = config.get("num_hidden_layers")
    if layers and isinstance(promised, int) and max(layers) + 1 != promised:
        raise CheckpointError(
            f"{path}: has {max(layers) + 1} layers, but {home / CONFIG} says {promised}. Name the config of this "
            f"model: hf=FOLDER:{path}"
        )
    return {name: replace(spec, name=name) for name, spec in renamed.items()}, config


def _of_llama(path: Path, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Return the tensors of a Llama as transformers names and orders them."""
    if config.get("model_type") != "llama":
        raise CheckpointError(
            f"{path}: has the names of Meta's Llama, which map to transformers' for model_type 'llama' alone; the "
            f"config says {config.get('model_type')!a}. Convert it with the trainer's own script."
        )
    renamed: dict[str, TensorSpec] = {}
    unknown: list[str] = []
    for name, spec in tensors.items():
        match = OF_LAYER.fullmatch(name)
        if name in LLAMA:
            renamed[LLAMA[name]] = spec
        elif match and match["part"] in LLAMA_LAYER:
            if match["part"] in ROTATED:
                spec = _halved(path, spec, config)
            renamed[f"model.layers.{match['layer']}.{LLAMA_LAYER[match['part']]}.weight"] = spec
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(listing(f"{path}: has names that no Llama of transformers has", unknown))
    return renamed


def _halved(path: Path, spec: TensorSpec, config: Mapping[str, Any]) -> TensorSpec:
    """Return a query or key projection with its rows as transformers has them."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head = config.get("head_dim") or (
        hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 0
    )
    if not isinstance(head, int) or head < 2 or head % 2 or len(spec.shape) != 2 or spec.shape[0] % head:
        raise CheckpointError(
            f"{path}: {spec.name} has shape {list(spec.shape)}, which are no heads of {head} rows as the config says. "
            f"Name the config of this model: hf=FOLDER:{path}"
        )
    return replace(spec, encoding=InterleavedHeads(spec, spec.shape[0] // head))
