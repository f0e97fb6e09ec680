"""A difference as a PEFT LoRA adapter: ``adapter_model.safetensors`` and ``adapter_config.json``, as peft loads them.

Weights of linear layers become factors, lora_B · lora_A with scale 1. All else that changed is stored in full:
embeddings, heads and norms as ``modules_to_save``, biases of adapted layers with ``bias: all``. What an adapter can't
say is refused by name: tensors of more than two dimensions, an embedding that the head is tied to, a changed
vocabulary, tensors that only one model has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, tied_weights
from mergekit_lite.checkpoint.adapter import PREFIX
from mergekit_lite.checkpoint.folder import ADAPTER_CONFIG
from mergekit_lite.errors import PlanError
from mergekit_lite.vectors.differences import Pair
from mergekit_lite.vectors.encoders import Sketch

WEIGHTS = "adapter_model.safetensors"
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # layers are transformers' Conv1D
POSITIONS = ("wpe", "positions_embed", "position_embeddings", "embed_positions", "token_type_embeddings")
LETTERS = {"left": "lora_B", "right": "lora_A"}


def is_transposed(base: Checkpoint) -> bool:
    """Whether the layers of a model store their weights as (in, out)."""
    return base.config is not None and base.config.get("model_type") in TRANSPOSED


def is_layer(pair: Pair) -> bool:
    """Whether a tensor is the weight of a linear layer that gets factors."""
    matrix = pair.base is not None and len(pair.tuned.shape) == 2 and min(pair.tuned.shape) > 0
    module, _, kind = pair.name.rpartition(".")
    return matrix and kind == "weight" and not tied_weights.is_vocabulary(pair.name) and not module.endswith(POSITIONS)


def naming(sketches: Mapping[str, Sketch], base: Checkpoint) -> Callable[[str, str], str]:
    """What gives a tensor's part its name in the adapter's file.

    The oldest checkpoints of GPT-2 leave out what the model's class puts in front of its layers; peft does not.
    """
    bare = is_transposed(base) and any(name.startswith("h.") for name in base.tensors)
    front = PREFIX + "transformer." * bare
    layers = {name.removesuffix(".weight") for name, sketch in sketches.items() if _is_low_rank(sketch)}

    def named(tensor: str, part: str) -> str:
        module, _, kind = tensor.rpartition(".")
        if part in LETTERS:
            return f"{front}{module}.{LETTERS[part]}.weight"
        return f"{front}{module}.base_layer.{kind}" if module in layers else f"{front}{tensor}"

    return named


def problems(pairs: Sequence[Pair]) -> list[str]:
    """What is known from the headers that an adapter can't say."""
    return [
        f"{pair.name}: only one of the models has it, or in another shape; an adapter can't say that"
        for pair in pairs
        if pair.base is None
    ]


def check_changed(changed: Sequence[Pair], base: Checkpoint) -> None:
    """Raise PlanError where a tensor that changed can't be in an adapter."""
    tied = not any(tied_weights.is_head(name) for name in base.tensors)
    found = []
    for pair in changed:
        module, _, kind = pair.name.rpartition(".")
        if len(pair.tuned.shape) > 2 or kind not in ("weight", "bias") or not dtypes.is_float(pair.tuned.dtype):
            found.append(f"{pair.name}: changed, but is no weight or bias of a layer; an adapter can't hold it")
        elif tied and tied_weights.is_embedding(pair.name):
            found.append(f"{pair.name}: changed, and the base ties its head to it; an adapter doesn't say who follows")
        elif not module:
            found.append(f"{pair.name}: changed, but belongs to no module")
    if found:
        raise PlanError([f"{text}. Use --format lowrank" for text in found])


def write_config(
    folder: Path, base: Checkpoint, changed: Sequence[Pair], sketches: Mapping[str, Sketch], rank: int | None
) -> None:
    """Write ``adapter_config.json``."""
    ranks = {
        pair.name.removesuffix(".weight"): sketch.parts[0].shape[1]
        for pair in changed
        if _is_low_rank(sketch := sketches[pair.name])
    }
    common = rank or max(ranks.values(), default=1)
    others = {module: own for module, own in ranks.items() if own != common}
    whole = [pair.name for pair in changed if pair.name.rpartition(".")[0] not in ranks]
    biases = [pair.name for pair in changed if pair.name.endswith(".bias") and pair.name[: -len(".bias")] in ranks]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.reference,
        "revision": base.revision,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": is_transposed(base),
        "init_lora_weights": True,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
        "rank_pattern": _exactly(others),
        "alpha_pattern": _exactly(others),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_low_rank(sketch: Sketch) -> bool:
    return sketch.parts[0].suffix == "left"


def _exactly(ranks: Mapping[str, int]) -> dict[str, int]:
    """As patterns, which are regular expressions that match the end of a module's path."""
    return {module.replace(".", r"\."): rank for module, rank in ranks.items()}
