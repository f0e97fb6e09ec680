"""PEFT folder: a difference as a LoRA adapter, ``adapter_model.safetensors`` and ``adapter_config.json``.

Weights of linear layers become factors, lora_B · lora_A with scale 1. All other tensors that changed are stored in
full: embeddings, heads and norms as ``modules_to_save``, biases of adapted layers with ``bias: all``. What an adapter
can't express is refused by name: tensors of more than two dimensions, an embedding that the head is tied to, a changed
vocabulary, tensors that only one model has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, tied_weights
from mergekit_lite.checkpoint.adapters.file import PREFIX
from mergekit_lite.checkpoint.folder import ADAPTER_CONFIG
from mergekit_lite.checkpoint.optional_tensors import promises_head
from mergekit_lite.errors import PlanError
from mergekit_lite.vectors.differences import TensorPair
from mergekit_lite.vectors.encoders import StoragePlan

WEIGHTS = "adapter_model.safetensors"
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # layers are transformers' Conv1D
POSITIONS = ("wpe", "positions_embed", "position_embeddings", "embed_positions", "token_type_embeddings")
LETTERS = {"left": "lora_B", "right": "lora_A"}


def is_transposed(base: Checkpoint) -> bool:
    """Return True where the layers of a model store their weights as (in, out)."""
    return base.config is not None and base.config.get("model_type") in TRANSPOSED


def is_layer(pair: TensorPair) -> bool:
    """Return True for the weight of a linear layer, which gets factors."""
    matrix = pair.base is not None and len(pair.tuned.shape) == 2 and min(pair.tuned.shape) > 0
    module, _, kind = pair.name.rpartition(".")
    return matrix and kind == "weight" and not tied_weights.is_vocabulary(pair.name) and not module.endswith(POSITIONS)


def naming(storage_plans: Mapping[str, StoragePlan], base: Checkpoint) -> Callable[[str, str], str]:
    """Return the function that gives the name of a tensor's part in the adapter's file.

    The oldest checkpoints of GPT-2 leave out the prefix ``transformer.`` of the layers' names; peft expects it.
    """
    bare = is_transposed(base) and any(name.startswith("h.") for name in base.tensors)
    front = PREFIX + "transformer." * bare
    layers = {name.removesuffix(".weight") for name, storage in storage_plans.items() if _is_low_rank(storage)}

    def named(tensor: str, part: str) -> str:
        module, _, kind = tensor.rpartition(".")
        if part in LETTERS:
            return f"{front}{module}.{LETTERS[part]}.weight"
        return f"{front}{module}.base_layer.{kind}" if module in layers else f"{front}{tensor}"

    return named


def header_problems(pairs: Sequence[TensorPair]) -> list[str]:
    """Return the problems that headers show: tensors that an adapter can't express."""
    return [
        f"{pair.name}: only one of the models has it, or in another shape; an adapter can't say that"
        for pair in pairs
        if pair.base is None
    ]


def check_changed(changed: Sequence[TensorPair], base: Checkpoint) -> None:
    """Raise PlanError where a tensor that changed can't be in an adapter."""
    tied = promises_head(base.config) and not any(tied_weights.is_head(name) for name in base.tensors)
    faults = []
    for pair in changed:
        module, _, kind = pair.name.rpartition(".")
        if len(pair.tuned.shape) > 2 or kind not in ("weight", "bias") or not dtypes.is_float(pair.tuned.dtype):
            faults.append(f"{pair.name}: changed, but is no weight or bias of a layer; an adapter can't hold it")
        elif tied and tied_weights.is_embedding(pair.name):
            faults.append(f"{pair.name}: changed, and the base ties its head to it, which an adapter would leave")
        elif not module:
            faults.append(f"{pair.name}: changed, but belongs to no module")
    if faults:
        raise PlanError([f"{text}. Use --format lowrank" for text in faults])


def write_config(folder: Path, base: Checkpoint, storage_plans: Mapping[str, StoragePlan], rank: int | None) -> None:
    """Write ``adapter_config.json`` for the tensors that changed; ``rank`` is the one that was asked for, if any."""
    ranks = {
        name.removesuffix(".weight"): storage.parts[0].shape[1]
        for name, storage in storage_plans.items()
        if _is_low_rank(storage)
    }
    in_full = [name for name in storage_plans if name.rpartition(".")[0] not in ranks]
    biases = [name for name in storage_plans if name.endswith(".bias") and name.removesuffix(".bias") in ranks]
    changes = {
        "revision": base.revision,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": is_transposed(base),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in in_full}) or None,
    }
    write_config_of(folder, ranks, rank, {"base_model_name_or_path": base.reference, **changes})


def write_config_of(folder: Path, ranks: Mapping[str, int], rank: int | None, changes: Mapping[str, Any]) -> None:
    """Write the ``adapter_config.json`` of a LoRA whose products have the scale 1.

    Args:
        folder: where it is written.
        ranks: of each module.
        rank: of the modules that get no pattern; None for the largest.
        changes: other entries of the config.
    """
    common = rank or max(ranks.values(), default=1)
    exceptions = _patterns({module: own for module, own in ranks.items() if own != common})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "modules_to_save": None,
        "rank_pattern": exceptions,
        "alpha_pattern": exceptions,
        **changes,
    }
    (folder / ADAPTER_CONFIG).write_bytes(json.dumps(config, indent=2).encode() + b"\n")


def _is_low_rank(storage: StoragePlan) -> bool:
    return storage.parts[0].suffix == "left"


def _patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks by patterns: regular expressions that match the end of a module's path."""
    return {module.replace(".", r"\."): rank for module, rank in ranks.items()}
