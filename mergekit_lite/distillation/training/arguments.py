"""A training of the recipe as the arguments of transformers' trainer."""

from __future__ import annotations

import dataclasses
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mergekit_lite.distillation.recipe.schema import Training
from mergekit_lite.distillation.training import deepspeed
from mergekit_lite.errors import UsageError, counted, nearest

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import TrainingArguments

LAST_CHECKPOINTS = 2  # kept, unless the recipe says otherwise by save_total_limit
# Arguments that the recipe has under a name of its own, or (with "") that a resumable run needs as they are.
OWN = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "max_steps": "epochs",
    "per_device_train_batch_size": "per_device_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_ratio",
    "lr_scheduler_type": "scheduler",
    "bf16": "dtype",
    "fp16": "dtype",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "save_steps": "save_steps",
    "report_to": "log_to",
    "neftune_noise_alpha": "train.sft.noise",
    "seed": "seed",
    "data_seed": "seed",
    "output_dir": "folder",
    **dict.fromkeys(("save_strategy", "save_only_model", "remove_unused_columns", "resume_from_checkpoint"), ""),
    **dict.fromkeys(("label_smoothing_factor", "auto_find_batch_size", "push_to_hub", "logging_nan_inf_filter"), ""),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "do_eval", "per_device_eval_batch_size"), "eval"),
    **dict.fromkeys(("eval_steps", "eval_delay", "eval_on_start"), "eval_steps"),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), "keep"),
}


class Length(NamedTuple):
    """The length of a training."""

    steps: int  # of the optimiser
    rows: int  # of all steps, with repetitions
    left: int  # rows left out because they fill no last batch


def length(training: Training, rows: int) -> Length:
    """Return the length of ``training.epochs`` over a number of rows.

    Raises:
        UsageError: the rows fill no batch.
    """
    total = math.floor(training.epochs * rows + 1e-9)
    steps = total // training.batch_size
    if not steps:
        raise UsageError(
            f"{training.epochs:g} epochs of {counted(rows, 'row')} don't fill a batch of {training.batch_size}. "
            f"Set batch_size to {max(1, total)} at most."
        )
    return Length(steps, steps * training.batch_size, total - steps * training.batch_size)


def wrong_trainer_keys(training: Training, stage: str) -> list[str]:
    """Return messages about ``trainer`` keys that TrainingArguments doesn't have, or that the recipe sets elsewhere."""
    from transformers import TrainingArguments

    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    problems = []
    for name in training.trainer:
        where = f"train.{stage}.trainer"
        if name == "deepspeed":
            problems.append(f"{where}: give DeepSpeed's file to accelerate launch, as `--deepspeed_config_file FILE`")
        elif name in OWN:
            instead = f"Use {OWN[name]!r} of the recipe." if OWN[name] else "This stage sees to it."
            problems.append(f"{where}: {name!r} can't be set here. {instead}")
        elif name not in known:
            problems.append(f"{where}: TrainingArguments have no {name!r}.{nearest(name, known)}")
    return problems


def processes(training: Training) -> PartialState:
    """Return the processes that train together. The first call has them find each other, by the recipe's arguments.

    Accelerate by itself takes each process on a CPU for the only one.
    """
    from accelerate import PartialState

    if _started() == 1:
        return PartialState()
    values = _devices() | training.trainer
    timeout = timedelta(seconds=values.get("ddp_timeout", 1800))
    return PartialState(cpu=values["use_cpu"], backend=values["ddp_backend"], timeout=timeout)


def _started() -> int:
    """Return how many processes were started to train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _devices() -> dict[str, Any]:
    """Return the arguments about what is computed on, and how processes speak to each other."""
    on_cpu, by_deepspeed = not torch.accelerator.is_available(), deepspeed.is_wanted()
    return {"use_cpu": on_cpu and not by_deepspeed, "ddp_backend": "gloo" if on_cpu and by_deepspeed else None}


def training_arguments(training: Training, folder: Path, steps: int, seed: int) -> TrainingArguments:
    """Return the trainer's arguments. Creating them sets up accelerate's processes and devices.

    The folder is that of the unfinished training, the seed that of dropout and adapters.

    Raises:
        UsageError: processes can't share the batch evenly, transformers refuses a value, or processes were started
            without accelerate.
    """
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # Newer versions of transformers call gradient checkpointing activation checkpointing.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    started = _started()
    # The largest part of a process's share that fits on the device and divides the share evenly.
    share = max(1, training.batch_size // started)
    part = max(size for size in range(1, min(training.per_device_batch_size, share) + 1) if share % size == 0)
    values: dict[str, Any] = {
        "logging_steps": 1,
        "save_total_limit": LAST_CHECKPOINTS,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        **_devices(),
        **training.trainer,
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": part,
        "gradient_accumulation_steps": share // part,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": math.ceil(training.warmup_ratio * steps),
        "bf16": training.dtype == "bfloat16",
        "fp16": training.dtype == "float16",
        checkpointing: training.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
        "logging_nan_inf_filter": False,  # it would log a loss that is not a number as 0
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "report_to": list(training.log_to),
        "remove_unused_columns": False,
        "seed": seed,
    }
    try:
        arguments = TrainingArguments(**values)
        count = arguments.world_size
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError(f"transformers refuses these arguments of training: {error}") from error
    if started > count:
        raise UsageError(
            "Several processes were started, but accelerate knows of one. Start them by accelerate launch."
        )
    if training.batch_size % count:
        raise UsageError(
            f"{count} processes can't share a batch_size of {training.batch_size}. Use a multiple of {count}."
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device a process: for several, accelerate launches processes
    return arguments
