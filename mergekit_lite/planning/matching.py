"""What two checkpoints must agree in, tensor by tensor, and where the output's tensors go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, tied_weights
from mergekit_lite.layout import (
    Layout,
    OutputPath,
    OutputTensor,
    file_layout,
    grouped_by_size,
    is_single_file,
    safetensors_layout,
    shard_names,
)
from mergekit_lite.planning.plan import Job

REMEDY = "tokenizer_source (--tokenizer-source) lets rows follow their tokens"


class MismatchError(Exception):
    """A tensor whose inputs don't agree; ``what`` says in which way, in the plan's list of problems."""

    def __init__(self, name: str, what: str):
        self.name, self.what = name, what
        super().__init__(f"{name}: {what}")


class MissingError(MismatchError):
    """A tensor that not all models have."""


def shared_elements(name: str, spec: TensorSpec, other: TensorSpec, where: str, new_rows: str | None) -> int:
    """Return how many leading elements two tensors share: all, or those of the rows that both vocabularies have.

    ``spec`` gives the output its shape; ``where`` is the reference of the other's model. ``new_rows`` is ``copy`` or
    ``refuse`` for rows that only ``spec`` has; None where they can't be copied. Raises MismatchError where the two
    can't go into one tensor.
    """
    if other.dtype != spec.dtype and not (dtypes.is_float(spec.dtype) and dtypes.is_float(other.dtype)):
        raise MismatchError(name, f"is {spec.dtype}, but {other.dtype} in {where}")
    if spec.shape == other.shape:
        return spec.numel
    is_vocabulary = tied_weights.is_vocabulary(name)
    alike = is_vocabulary and len(spec.shape) == len(other.shape) and spec.shape[1:] == other.shape[1:]
    grown = alike and new_rows is not None and spec.shape[0] > other.shape[0]
    if grown and new_rows == "copy":
        return other.numel
    hint = f": the vocabularies differ; {REMEDY}" if alike else ""
    if grown:
        rows = spec.shape[0] - other.shape[0]
        hint = f" ({rows:,} more rows: the vocabulary grew; --new-rows copy takes them as they are, {REMEDY})"
    raise MismatchError(name, f"shape {list(spec.shape)}, but {list(other.shape)} in {where}{hint}")


def output_dtype(spec: TensorSpec, asked: str | None) -> str:
    """Return the dtype a tensor is written in: a float's in the one asked for, else as in the checkpoint."""
    if not dtypes.is_float(spec.dtype):
        return spec.dtype
    return asked or spec.written_as or spec.dtype


def arranged(jobs: list[Job], source: Checkpoint, output: OutputPath, shard_size: int | None) -> Layout:
    """Return the layout of the jobs' tensors; put the jobs into its order.

    The name of ``output`` says whether a file or a folder is wanted. A folder takes over the shards of ``source`` where
    no ``shard_size`` is given.
    """
    layout = _layout(jobs, source, output, shard_size)
    order = {tensor.name: number for number, tensor in enumerate(t for file in layout.files for t in file.tensors)}
    jobs.sort(key=lambda job: order[job.name])
    return layout


def _layout(tensors: Sequence[OutputTensor], source: Checkpoint, output: OutputPath, shard_size: int | None) -> Layout:
    if is_single_file(output):
        return file_layout(tensors, output.name, source.nest)
    of_parts: dict[tuple[str, str], list[OutputTensor]] = {(part.folder, part.stem): [] for part in source.parts}
    for tensor in tensors:
        part = source.part_of(tensor.name)
        of_parts[part.folder, part.stem].append(tensor)
    groups: list[Sequence[OutputTensor]] = []
    names: list[str] = []
    for (folder, stem), own in of_parts.items():
        shards = grouped_by_size(own, shard_size) if shard_size else _sharded_alike(own, source)
        groups += shards
        names += shard_names(len(shards), folder, stem) if shards else []
    return safetensors_layout(groups, names)


def _sharded_alike(tensors: Sequence[OutputTensor], source: Checkpoint) -> list[list[OutputTensor]]:
    """Return a part's tensors in groups, one for each file of the source that holds any of them."""
    shards: dict[Path, list[OutputTensor]] = {file.path: [] for file in source.files}
    for tensor in tensors:
        shards[source.tensors[tensor.name].file].append(tensor)
    return [shard for shard in shards.values() if shard]
