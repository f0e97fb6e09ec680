"""Models in GGUF shown as transformers has them: names, order of rows, norms, experts, and the config.

llama.cpp's converter gives every tensor a name of its own, by a table that the ``gguf`` package has (``TensorNameMap``)
and that is read here backwards. What else it does to the tensors of an architecture is in ``ARCHITECTURES``, and only
architectures for which that is known are read. Its classes are in the folder ``conversion`` of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lite.checkpoint.encodings.converted import InterleavedHeads, PlusOne
from mergekit_lite.checkpoint.encodings.ggml import gguf_library
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError, listing, shortened

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
MLP_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")  # of the layers
LAYER = re.compile(r"blk\.(\d+)\.(.+)")
FREQUENCIES = re.compile(r"(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight")
TOO_OLD = "The installed gguf package doesn't know the architecture {}: pip install -U gguf"
QUERIES, KEYS = "self_attn.q_proj", "self_attn.k_proj"

# Settings of transformers by llama.cpp's keys, without the architecture before them.
SETTINGS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
EXPERT_SETTINGS = {"expert_used_count": "num_experts_per_tok"}
SAID_OTHERWISE = ("vocab_size", "attention.value_length", "rope.dimension_count")  # by a shape, or by another key
TOKEN_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


@dataclass(frozen=True)
class Architecture:
    """What the converter makes of the models of one architecture.

    ``modules`` are those of a layer, as transformers names them, and ``experts`` those of each expert, with the names
    that stand for all experts in the table of the ``gguf`` package.
    """

    title: str  # the class of transformers
    model_type: str
    modules: tuple[str, ...]
    experts: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False  # whether rows of queries and keys were put side by side by rotary pairs
    norms_plus_one: bool = False
    settings: Mapping[str, str] | None = None  # by keys; None where the header doesn't say all that a config must
    constants: Mapping[str, Any] = field(default_factory=dict)  # settings that all models of it have


LLAMA = (*ATTENTION, *MLP, *NORMS)
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", LLAMA, interleaved=True, settings=SETTINGS),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", LLAMA, settings=SETTINGS),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", (*LLAMA, *HEAD_NORMS), settings=SETTINGS),
    "gemma": Architecture("GemmaForCausalLM", "gemma", LLAMA, norms_plus_one=True, settings=SETTINGS),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", (*LLAMA, *MLP_NORMS), norms_plus_one=True),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "gemma3_text", (*LLAMA, *MLP_NORMS, *HEAD_NORMS), norms_plus_one=True
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM", "phi3",
        ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *NORMS),
    ),
    "starcoder2": Architecture("Starcoder2ForCausalLM", "starcoder2", (*ATTENTION, "mlp.c_fc", "mlp.c_proj", *NORMS)),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", (*ATTENTION, *NORMS, *HEAD_NORMS, "mlp.gate"),
        experts={
            "mlp.experts.{expert}.gate_proj": "model.layers.{bid}.mlp.experts.gate_proj",
            "mlp.experts.{expert}.up_proj": "model.layers.{bid}.mlp.experts.up_proj",
            "mlp.experts.{expert}.down_proj": "model.layers.{bid}.mlp.experts.down_proj",
        },
        settings={
            **SETTINGS, **EXPERT_SETTINGS,
            "expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size",
        },
        constants={"norm_topk_prob": True},  # llama.cpp knows no other models of it
    ),
}  # fmt: skip
MIXTRAL = Architecture(  # a llama with experts
    "MixtralForCausalLM", "mixtral", (*ATTENTION, *NORMS, "block_sparse_moe.gate"),
    experts={
        "block_sparse_moe.experts.{expert}.w1": "layers.{bid}.feed_forward.experts.w1",
        "block_sparse_moe.experts.{expert}.w2": "layers.{bid}.feed_forward.experts.w2",
        "block_sparse_moe.experts.{expert}.w3": "layers.{bid}.feed_forward.experts.w3",
    },
    interleaved=True,
    settings={**SETTINGS, **EXPERT_SETTINGS, "expert_count": "num_local_experts"},
)  # fmt: skip


class Shown(NamedTuple):
    """A model in GGUF as transformers has it."""

    tensors: dict[str, TensorSpec]
    left_out: dict[str, str]  # why, by the stored name
    config: dict[str, Any] | None  # made of the header; None where that doesn't say enough
    config_made: str  # how it was made, or why it wasn't


def as_transformers(path: Path, tensors: Mapping[str, TensorSpec], parts: Sequence[Mapping[str, Any]]) -> Shown:
    """Show the tensors of a GGUF under transformers' names, with what the converter changed undone.

    Args:
        path: the file, or the folder of its parts, for messages.
        tensors: those of all parts, by llama.cpp's names.
        parts: the values of each part's header; the first one's describe the model.

    Raises:
        CheckpointError: a part is missing, the architecture is not in the table, it holds no language model, or a
            tensor has no place in its architecture.
    """
    values = parts[0]
    count = values.get("split.count", len(parts))
    if [each.get("split.no", 0) for each in parts] != list(range(len(parts))) or count != len(parts):
        raise CheckpointError(
            f"{path}: is one of {count} parts of a GGUF, or its parts are out of order. Name the first part, with all "
            "others in the same folder under the names that llama.cpp gave them."
        )
    name, architecture = _architecture(path, values)
    heads = _heads(path, name, values) if architecture.interleaved else {}
    names = _stored_names(name, architecture)
    shown: dict[str, TensorSpec] = {}
    left_out: dict[str, str] = {}
    unknown: list[str] = []
    for stored, spec in tensors.items():
        if FREQUENCIES.fullmatch(stored):
            left_out[stored] = "rotary frequencies, computed on loading from the config"
            continue
        template = names.get(_without_layer(stored))
        if template is None or ("{expert}" in template and len(spec.shape) != 3):
            unknown.append(f"{stored} {list(spec.shape)}")
        else:
            layer = LAYER.match(stored)
            full = template.replace("{bid}", layer[1] if layer else "")
            for each in _experts(full, spec) if "{expert}" in full else [replace(spec, name=full)]:
                shown[each.name] = _undone(path, each, architecture, heads)
    if unknown:
        title = f"{path}: tensors for which {architecture.title} has no place"
        raise CheckpointError(listing(title, unknown) + "\nUse the safetensors that the file was made from.")
    dtype = _dtype_of_matrices(shown)
    config, how = _config(name, architecture, values, tensors)
    if config is not None:
        config["torch_dtype"] = dtype
    return Shown(_written_alike(shown, dtype), left_out, config, how)


def _architecture(path: Path, values: Mapping[str, Any]) -> tuple[str, Architecture]:
    """Return the architecture by llama.cpp's name. Raises CheckpointError where it isn't in the table."""
    kind, name = values.get("general.type", "model"), values.get("general.architecture")
    if kind != "model":
        raise CheckpointError(f"{path}: is a GGUF of the type {shortened(repr(kind), 40)}, not a model.")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: GGUF of the architecture {shortened(repr(name), 40)} isn't read, as what its converter changed "
            f"is not known here (known: {', '.join(ARCHITECTURES)}). Use the safetensors that the file was made from."
        )
    has_experts = bool(values.get(f"{name}.expert_count"))
    return name, MIXTRAL if name == "llama" and has_experts else ARCHITECTURES[name]


def _stored_names(name: str, architecture: Architecture) -> dict[str, str]:
    """Return a template of the name in transformers by the stored name, in which a layer is number 0."""
    library = gguf_library()
    kinds = {text: kind for kind, text in library.MODEL_ARCH_NAMES.items()}
    if name not in kinds:
        raise CheckpointError(TOO_OLD.format(name))
    table = library.TensorNameMap(kinds[name], 1)
    modules = {module: module for module in OUTSIDE}
    modules |= {f"model.layers.{{bid}}.{module}": f"model.layers.0.{module}" for module in architecture.modules}
    modules |= {
        f"model.layers.{{bid}}.{module}": key.replace("{bid}", "0") for module, key in architecture.experts.items()
    }
    stored = {table.get_name(key): module for module, key in modules.items()}
    if stored.pop(None, "lm_head") != "lm_head":  # which some architectures don't have
        raise CheckpointError(TOO_OLD.format(name))
    return {f"{each}.{end}": f"{module}.{end}" for each, module in stored.items() for end in ("weight", "bias")}


def _without_layer(stored: str) -> str:
    return LAYER.sub(r"blk.0.\2", stored)


def _experts(name: str, spec: TensorSpec) -> Iterator[TensorSpec]:
    """Yield each expert's matrix of a stack, which are stored one after another."""
    for expert in range(spec.shape[0]):
        one = replace(spec, name=name.replace("{expert}", str(expert)), shape=spec.shape[1:])
        yield replace(one, offset=spec.offset + expert * one.nbytes)


def _heads(path: Path, name: str, values: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of heads by the module whose rows are theirs."""
    queries = values.get(f"{name}.attention.head_count")
    keys = values.get(f"{name}.attention.head_count_kv", queries)
    for count in (queries, keys):
        if type(count) is not int or count < 1:
            raise CheckpointError(
                f"{path}: {name}.attention.head_count {shortened(repr(count), 40)} is not a number of heads, and rows "
                "of queries and keys are put right by it."
            )
    return {QUERIES: queries, KEYS: keys}


def _undone(path: Path, spec: TensorSpec, architecture: Architecture, heads: Mapping[str, int]) -> TensorSpec:
    """Return a tensor with what the converter did to it undone."""
    module = spec.name.rpartition(".")[0]
    if architecture.norms_plus_one and spec.name.endswith("norm.weight"):
        return replace(spec, encoding=PlusOne(spec))
    count = next((number for part, number in heads.items() if module.endswith(part)), None)
    if count is None:
        return spec
    rows = spec.shape[0] if spec.shape else 0
    if not rows or rows % (2 * count):
        raise CheckpointError(f"{path}: {spec.name} has {rows:,} rows, which are no {count} heads of rotary pairs.")
    return replace(spec, encoding=InterleavedHeads(spec, count))


def _dtype_of_matrices(tensors: Mapping[str, TensorSpec]) -> str:
    """Return the dtype in which most elements of matrices are written."""
    elements: Counter[str] = Counter()
    for spec in tensors.values():
        elements[spec.written_as or spec.dtype] += spec.numel if len(spec.shape) > 1 else 0
    return elements.most_common(1)[0][0] if elements else "float32"


def _written_alike(tensors: Mapping[str, TensorSpec], dtype: str) -> dict[str, TensorSpec]:
    """Return the tensors with vectors to be written in the dtype of the matrices: in GGUF they are always float32."""
    return {
        name: replace(spec, written_as=dtype) if len(spec.shape) == 1 and spec.dtype == "float32" else spec
        for name, spec in tensors.items()
    }


def _config(
    name: str, architecture: Architecture, values: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> tuple[dict[str, Any] | None, str]:
    """Return the config that a header makes, or None and why it makes none."""
    if architecture.settings is None:
        return None, f"there is no config.json, as the header of a {name} GGUF doesn't say all of its config"
    own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
    known = {*architecture.settings, *SAID_OTHERWISE}
    odd = [f"{name}.{key}" for key, value in own.items() if key not in known and value]
    odd += [stored for stored in tensors if FREQUENCIES.fullmatch(stored)]
    odd += [stored for stored in tensors if architecture.interleaved and stored.endswith(".bias")]
    if odd:
        others = f" (of {len(odd):,} such)" if len(odd) > 1 else ""
        return (
            None,
            f"there is no config.json, as no setting is known for {shortened(odd[0], 80)}{others} of its header",
        )
    if "token_embd.weight" not in tensors or any(type(own.get(key)) is not int for key in NEEDED):
        return None, f"there is no config.json, as its header lacks one of {', '.join(NEEDED)}, or it has no embedding"
    settings = {
        setting: _shortest(own[key]) for key, setting in architecture.settings.items() if _is_number(own.get(key))
    }
    if architecture.interleaved and type(own.get("rope.dimension_count")) is int:
        settings.setdefault("head_dim", own["rope.dimension_count"])
    settings |= {setting: values[key] for key, setting in TOKEN_IDS.items() if type(values.get(key)) is int}
    config = {
        "architectures": [architecture.title],
        "model_type": architecture.model_type,
        **settings,
        **architecture.constants,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return config, "config.json is made of its header"


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _shortest(value: float) -> float:
    """Return the shortest number that a float32 stands for: a header has 1e-05 as 9.999999747378752e-06."""
    if isinstance(value, int):
        return value
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 9))
    return next((each for each in candidates if struct.pack("<f", each) == struct.pack("<f", value)), value)
