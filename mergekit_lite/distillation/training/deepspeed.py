"""DeepSpeed as ``accelerate config`` sets it up: what the recipe says goes, for each stage anew."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import TrainingArguments

AUTO = "auto"  # DeepSpeed's word for a value that the trainer fills in


def is_wanted() -> bool:
    """Return whether the process was started with DeepSpeed, which accelerate leaves out silently on a CPU.

    So where its file says ``use_cpu``, that is taken back: DeepSpeed itself finds out what there is to run on.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return False
    os.environ.pop("ACCELERATE_USE_CPU", None)
    return True


def fit(arguments: TrainingArguments) -> list[str]:
    """Put the numbers of a stage into the configuration that its arguments were created with, in place.

    Two stages may need different batches, and one file has one number; so the recipe's replace the file's. ZeRO-3 is
    told to gather the weights when they are saved, and a schedule of DeepSpeed's gives way to the recipe's.

    Returns:
        A remark for each number that the file had otherwise.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        return []
    config = plugin.deepspeed_config
    part, times = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": part,
        "gradient_accumulation_steps": times,
        "train_batch_size": part * times * arguments.world_size,
        "gradient_clipping": float(arguments.max_grad_norm),
        "bf16.enabled": arguments.bf16,
        "fp16.enabled": arguments.fp16,
    }
    if plugin.zero_stage == 3:
        own["zero_optimization.stage3_gather_16bit_weights_on_model_save"] = True
    of_optimizer = {
        "lr": arguments.learning_rate,
        "betas": [arguments.adam_beta1, arguments.adam_beta2],
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
    }
    has = config.get("optimizer", {}).get("params", {})
    own |= {f"optimizer.params.{name}": value for name, value in of_optimizer.items() if name in has}
    changed = list(_changes(config, own))
    if "scheduler" in config:
        del config["scheduler"]
        changed.append("scheduler: the recipe's")
    plugin.gradient_accumulation_steps = times
    return changed


def _changes(config: dict[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    for path, value in own.items():
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        before = section.get(key, AUTO)
        section[key] = value
        if before not in (AUTO, value) and sections != ["zero_optimization"]:
            yield f"{path} {value} for {before}"


def is_partitioned(model: Module) -> bool:
    """Return whether ZeRO-3 keeps only this process's share of the weights, and the whole of none outside a pass."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def forget() -> None:
    """Have transformers load models whole again: it partitions them as long as it remembers a ZeRO-3 configuration.

    And let the trained model go, which DeepSpeed keeps in a list of the modules that passes went through.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    getattr(offload, "FWD_MODULE_STACK", []).clear()


def part() -> None:
    """Leave the other processes. DeepSpeed remembers groups that it set up, and none goes while somebody has it."""
    groups = sys.modules.get("deepspeed.comm")
    if groups is None or not groups.is_initialized():
        groups = torch.distributed
    groups.destroy_process_group()
