"""Recognise a training checkpoint by what lies in its folder, and read it."""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint.training import zero
from mergekit_lite.checkpoint.training.distributed import METADATA, read_distributed
from mergekit_lite.checkpoint.training.safetensors_shards import SHARD, read_shards
from mergekit_lite.checkpoint.training.state import State
from mergekit_lite.errors import CheckpointError, listing
from mergekit_lite.input_files import read_text

PIECES = ".distcp"
TAGS = {"latest": "", "latest_checkpointed_iteration.txt": "iter_"}  # files that name the newest step
ACCELERATE = re.compile(r"pytorch_model_fsdp_\d+")
STEP = re.compile(r"(?:step|iter|epoch|checkpoint|global_step)[-_]?\d+", re.IGNORECASE)
MEGATRON = re.compile(r"mp_rank_\d+(_\d+)*")  # folders of Megatron's older format, "torch"
MAX_TAG = 1000


def open_training(folder: Path, within: str = "") -> State | None:
    """Return the weights of a training checkpoint, or of what is under the keys ``within``; None where it is none.

    ``folder`` is that of one step, or one whose ``latest`` names it. Raises CheckpointError where the weights can't be
    put together; the message says what to do.
    """
    names = {path.name for path in folder.iterdir()}
    if not within and folders.has_model(names):
        return None
    if any(name.endswith(PIECES) for name in names):
        if METADATA not in names:
            raise CheckpointError(
                f"{folder}: has pieces of torch.distributed.checkpoint ({PIECES}), but not their {METADATA}, which is "
                "written last. The save was interrupted, or copy the hidden file as well."
            )
        return read_distributed(folder, within)
    if any(map(SHARD.fullmatch, names)):
        return read_shards(folder, names)
    if any(name.endswith(zero.ENDINGS) for name in names):
        return zero.read_zero(folder, names, within)
    if cut := sorted(name for name in names if MEGATRON.fullmatch(name) and (folder / name).is_dir()):
        raise CheckpointError(
            listing(f"{folder}: is a checkpoint in Megatron's older format, cut by tensor parallelism", cut, 3)
            + "\nThe files don't say along which dimension each tensor is cut. Save it with --ckpt-format torch_dist, "
            "or convert it with Megatron's tools/checkpoint/convert.py."
        )
    if (step := _newest(folder, names)) is not None:
        return open_training(step, within)
    return None


def _newest(folder: Path, names: set[str]) -> Path | None:
    """Return the folder of the step that is meant, where ``folder`` has steps in it. Raises CheckpointError."""
    for file, prefix in TAGS.items():
        if file in names:
            tag = read_text(folder / file, MAX_TAG).strip()
            step = f"{prefix}{tag:0>7}" if prefix and tag.isdigit() else tag
            if "/" in step or not step.isprintable() or not (folder / step).resolve().is_relative_to(folder.resolve()):
                raise CheckpointError(f"{folder / file}: names {step!a}, which is no folder in this one.")
            if not (folder / step).is_dir() or step in ("", ".", ".."):
                raise CheckpointError(f"{folder / file}: names {step}, which isn't there. Name the folder of a step.")
            return folder / step
    inner = [folder / name for name in sorted(names) if (folder / name / METADATA).is_file()]
    fsdp = [path for path in inner if ACCELERATE.fullmatch(path.name)]
    steps = [path for path in inner if STEP.fullmatch(path.name)]
    if len(fsdp) > 1 or (not fsdp and len(steps) > 1):
        several = [path.name for path in fsdp or steps]
        raise CheckpointError(
            listing(f"{folder}: holds several training checkpoints; name the one that is meant", several)
        )
    return next(iter(fsdp or steps), None)
