"""A stage of the recipe as the arguments of transformers' trainer."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mergekit_lite.distillation.recipe import Training
from mergekit_lite.errors import UsageError, counted, nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What users write in the recipe under another name, or what a resumable run needs as it is.
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
    "seed": "seed",
    "data_seed": "seed",
    "output_dir": "folder",
    **dict.fromkeys(("save_strategy", "save_only_model", "remove_unused_columns", "resume_from_checkpoint"), ""),
    **dict.fromkeys(("label_smoothing_factor", "auto_find_batch_size", "push_to_hub", "load_best_model_at_end"), ""),
}


class Course(NamedTuple):
    """How many steps of how many rows.

    Attributes:
        steps: optimiser steps.
        places: rows over all steps.
        left: rows that fill no last batch.
    """

    steps: int
    places: int
    left: int


def course(training: Training, rows: int) -> Course:
    """The steps that ``epochs`` over so many rows make.

    Raises:
        UsageError: not a single one.
    """
    wanted = math.floor(training.epochs * rows + 1e-9)
    steps = wanted // training.batch_size
    if not steps:
        raise UsageError(
            f"{training.epochs:g} epochs of {counted(rows, 'row')} don't fill a batch of {training.batch_size}. "
            f"Set batch_size to {max(1, wanted)} at most."
        )
    return Course(steps, steps * training.batch_size, wanted - steps * training.batch_size)


def wrong_trainer_keys(training: Training, stage: str) -> list[str]:
    """What is wrong with the recipe's ``trainer``: keys that TrainingArguments lacks, or that have another place."""
    from transformers import TrainingArguments

    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    problems = []
    for name in training.trainer:
        where = f"train.{stage}.trainer"
        if name in OWN:
            instead = f"Use {OWN[name]!r} of the recipe." if OWN[name] else "This stage sees to it."
            problems.append(f"{where}: {name!r} can't be set here. {instead}")
        elif name not in known:
            problems.append(f"{where}: TrainingArguments have no {name!r}.{nearest(name, known)}")
    return problems


def training_arguments(training: Training, folder: Path, steps: int, seed: int) -> TrainingArguments:
    """The trainer's arguments; this sets up the processes and devices that accelerate was told of.

    Args:
        training: the stage of the recipe.
        folder: of the unfinished stage.
        steps: optimiser steps.
        seed: of dropout and adapters.

    Raises:
        UsageError: the batch can't be shared out evenly, a value is refused, or processes don't know each other.
    """
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # transformers renamed it; under both names the activations between layers are kept only.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    values: dict[str, Any] = {
        "logging_steps": 1,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        **training.trainer,
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": math.ceil(training.warmup_ratio * steps),
        "bf16": training.dtype == "bfloat16",
        "fp16": training.dtype == "float16",
        checkpointing: training.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "report_to": list(training.log_to),
        "remove_unused_columns": False,
        "seed": seed,
    }
    try:
        made = TrainingArguments(**values)
        processes = made.world_size
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError(f"transformers refuses these arguments of training: {error}") from error
    if int(os.environ.get("WORLD_SIZE", "1")) > processes:
        raise UsageError(
            "Several processes were started, but accelerate knows of one. Start them by accelerate launch."
        )
    if training.batch_size % processes:
        raise UsageError(
            f"{processes} processes can't share a batch_size of {training.batch_size}. Use a multiple of {processes}."
        )
    each = training.batch_size // processes
    together = max(size for size in range(1, min(training.per_device_batch_size, each) + 1) if each % size == 0)
    made.per_device_train_batch_size, made.gradient_accumulation_steps = together, each // together
    made._n_gpu = min(made.n_gpu, 1)  # one device for each process: several are accelerate's to launch
    return made
