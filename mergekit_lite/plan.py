"""Recipe + checkpoints ▸ plan: everything that will be done, decided from headers before a weight is read.

A plan is plain data. It accounts for every tensor of every input: merged, copied, or left out, each with a reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lite import dtypes
from mergekit_lite._version import __version__
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, open_checkpoint, ties
from mergekit_lite.checkpoint.folder import TORCH_SUFFIXES
from mergekit_lite.errors import PlanError
from mergekit_lite.output.layout import Layout, OutputTensor, grouped_by_size, safetensors_layout, torch_layout
from mergekit_lite.recipe import Recipe

BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attention.bias")


@dataclass(frozen=True, slots=True)
class Job:
    """One output tensor.

    Attributes:
        name, shape, dtype: of the output.
        inputs: the tensors it is made of: the models', then the base's where there is one.
        has_base: whether the last input is the base.
        method: the method's name; empty for a copy.
        parameters: the method's keyword arguments, once for each variant. Empty for a copy.
        merged: how many leading elements go through the method; the rest is copied from the first input. 0 for a copy.
        why: for a copy, the reason.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    inputs: tuple[TensorSpec, ...]
    has_base: bool = False
    method: str = ""
    parameters: tuple[Mapping[str, Any], ...] = ()
    merged: int = 0
    why: str = ""

    @property
    def numel(self) -> int:
        """Number of elements of the output."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return self.numel * dtypes.size(self.dtype)


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        recipe: what was asked for.
        inputs: the opened checkpoints, in the order of ``recipe.models``.
        jobs: one for each output tensor, in the order they are written.
        left_out: what no output tensor is made of: (reference, name, reason).
        layout: where each output tensor lies; the same for every variant.
        outputs: a path for each variant.
        notes: what the user should know before it runs.
    """

    recipe: Recipe
    inputs: tuple[Checkpoint, ...]
    jobs: tuple[Job, ...]
    left_out: tuple[tuple[str, str, str], ...]
    layout: Layout
    outputs: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    @property
    def merged(self) -> list[Job]:
        """The jobs that go through the method."""
        return [job for job in self.jobs if job.merged]

    @property
    def copied(self) -> list[Job]:
        """The jobs that take a tensor over as it is."""
        return [job for job in self.jobs if not job.merged]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of weights that will be read."""
        return sum(spec.nbytes for job in self.jobs for spec in job.inputs)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of weights that will be written, all variants together."""
        return self.layout.nbytes * len(self.outputs)

    @property
    def most_inputs(self) -> int:
        """The largest number of tensors that go into one."""
        return max((len(job.inputs) for job in self.jobs), default=1)

    @property
    def widest_element(self) -> int:
        """Bytes of the widest element that is read or written."""
        read = {spec.dtype for job in self.jobs for spec in job.inputs}
        return max((dtypes.size(dtype) for dtype in read | {job.dtype for job in self.jobs}), default=1)

    @property
    def sources(self) -> list[tuple[str, int, int]]:
        """Every input file with its size and time: what must not change until a run and its resumptions are done."""
        return [(str(file.path), file.size, file.mtime_ns) for source in self.inputs for file in source.files]

    def digest(self, variant: int) -> str:
        """Identifies one output: plans with equal digests write the same bytes from equal files, wherever those lie."""
        described = [
            __version__,
            (self.recipe.merge_method, self.recipe.models, self.recipe.rounding, self.recipe.seed),
            [(file.path.name, file.size, file.header_digest) for source in self.inputs for file in source.files],
            [(file.name, file.size) for file in self.layout.files],
            self.layout.nest,
        ]
        jobs = [
            (
                job.name,
                job.shape,
                job.dtype,
                job.method,
                job.has_base,
                job.merged,
                job.parameters[variant : variant + 1],
            )
            for job in self.jobs
        ]
        read = [[(spec.name, spec.dtype, spec.file.name, spec.offset) for spec in job.inputs] for job in self.jobs]
        return xxhash.xxh3_128_hexdigest(repr((described, jobs, read)).encode())


def plan(recipe: Recipe, outputs: Sequence[str | Path]) -> Plan:
    """Resolve a recipe against its models' headers.

    Args:
        recipe: the recipe.
        outputs: a path for each of its variants: ``*.safetensors``, ``*.pt`` / ``*.pth`` / ``*.bin``, or a folder.

    Raises:
        CheckpointError: a model can't be opened.
        PlanError: the models don't fit together; every problem is named.
    """
    inputs = tuple(open_checkpoint(model) for model in recipe.models)
    jobs, left_out, problems = _jobs(recipe, inputs)
    problems += [
        f"the pattern {pattern!r} matches no tensor of {inputs[0].reference}"
        for pattern in recipe.patterns
        if not any(re.search(pattern, name) for name in inputs[0].tensors)
    ]
    if problems:
        raise PlanError(problems)
    paths = tuple(Path(output).expanduser() for output in outputs)
    layout = _layout(recipe, inputs[0], jobs, paths[0])
    order = {tensor.name: number for number, tensor in enumerate(t for file in layout.files for t in file.tensors)}
    jobs.sort(key=lambda job: order[job.name])
    return Plan(recipe, inputs, tuple(jobs), tuple(left_out), layout, paths, tuple(_notes(jobs, left_out)))


def _jobs(recipe: Recipe, inputs: tuple[Checkpoint, ...]) -> tuple[list[Job], list[tuple[str, str, str]], list[str]]:
    first, *others = inputs
    jobs: list[Job] = []
    problems: list[str] = []
    used: list[set[str]] = [set() for _ in others]
    for spec in first.tensors.values():
        counterparts = [other.tensors.get(spec.name) or ties.tied_to(spec.name, other.tensors) for other in others]
        for names, counterpart in zip(used, counterparts, strict=True):
            if counterpart is not None:
                names.add(counterpart.name)
        try:
            jobs.append(_job(recipe, spec, counterparts, [other.reference for other in others]))
        except _MismatchError as mismatch:
            problems.append(str(mismatch))
    left_out = [(checkpoint.reference, name, why) for checkpoint in inputs for name, why in checkpoint.left_out.items()]
    for other, names in zip(others, used, strict=True):
        for name in other.tensors:
            if name in names:
                continue
            why = _why_spare(name, first)
            if why is None:
                problems.append(f"{name}: is in {other.reference}, but not in {first.reference}")
            else:
                left_out.append((other.reference, name, why))
    return jobs, left_out, problems


class _MismatchError(Exception):
    """A tensor whose inputs don't agree; the message is one line of the plan's list of problems."""


def _job(recipe: Recipe, spec: TensorSpec, counterparts: Sequence[TensorSpec | None], references: Sequence[str]) -> Job:
    copy = Job(spec.name, spec.shape, _out_dtype(recipe, spec), (spec,))
    if not recipe.selects(spec.name):
        return _replace_why(copy, "not selected")
    if not dtypes.is_float(spec.dtype):
        return _replace_why(copy, f"{spec.dtype} is not for arithmetic")
    present: list[TensorSpec] = []
    merged = spec.numel
    for reference, counterpart in zip(references, counterparts, strict=True):
        if counterpart is None:
            if _is_buffer(spec.name):
                return _replace_why(copy, f"a buffer that {reference} lacks")
            raise _MismatchError(f"{spec.name}: is missing in {reference}")
        if not dtypes.is_float(counterpart.dtype):
            raise _MismatchError(f"{spec.name}: is {spec.dtype} here, {counterpart.dtype} in {reference}")
        merged = min(merged, _shared_elements(recipe, spec, counterpart, reference))
        present.append(counterpart)
    parameters = tuple(
        {name: setting.value(spec.name) for name, setting in variant.items()} for variant in recipe.variants
    )
    return Job(
        spec.name,
        spec.shape,
        copy.dtype,
        (spec, *present),
        has_base=True,
        method=recipe.merge_method,
        parameters=parameters,
        merged=merged,
    )


def _shared_elements(recipe: Recipe, spec: TensorSpec, other: TensorSpec, reference: str) -> int:
    """How many leading elements two tensors share: all of them, or those of the rows both vocabularies have."""
    if spec.shape == other.shape:
        return spec.numel
    grown = (
        ties.is_vocabulary(spec.name)
        and len(spec.shape) == len(other.shape)
        and spec.shape[1:] == other.shape[1:]
        and spec.shape[0] > other.shape[0]
    )
    if grown and recipe.new_rows == "copy":
        return other.numel
    hint = ""
    if grown:
        rows = spec.shape[0] - other.shape[0]
        hint = f" ({rows:,} more rows: the vocabulary grew; --new-rows copy takes them as they are)"
    raise _MismatchError(f"{spec.name}: shape {list(spec.shape)}, but {list(other.shape)} in {reference}{hint}")


def _out_dtype(recipe: Recipe, spec: TensorSpec) -> str:
    if not dtypes.is_float(spec.dtype):
        return spec.dtype
    return recipe.out_dtype or ("bfloat16" if spec.scale else spec.dtype)


def _replace_why(job: Job, why: str) -> Job:
    return Job(job.name, job.shape, job.dtype, job.inputs, why=why)


def _why_spare(name: str, first: Checkpoint) -> str | None:
    """Why a tensor that the first model lacks may be left out, or None where it may not."""
    if ties.tied_to(name, first.tensors) is not None:
        return f"{first.reference} ties its head to its embedding"
    return "a buffer, computed on loading" if _is_buffer(name) else None


def _is_buffer(name: str) -> bool:
    return name.endswith(BUFFERS)


def _layout(recipe: Recipe, first: Checkpoint, jobs: Sequence[Job], output: Path) -> Layout:
    tensors = [OutputTensor(job.name, job.dtype, job.shape) for job in jobs]
    if output.suffix in TORCH_SUFFIXES:
        return torch_layout(tensors, output.name, first.nest)
    if output.suffix == ".safetensors":
        return safetensors_layout([tensors], output.name)
    if recipe.shard_size is not None:
        return safetensors_layout(grouped_by_size(tensors, recipe.shard_size))
    shards: dict[Path, list[OutputTensor]] = {file.path: [] for file in first.files}
    for tensor in tensors:
        shards[first.tensors[tensor.name].file].append(tensor)
    return safetensors_layout([shard for shard in shards.values() if shard])


def _notes(jobs: Sequence[Job], left_out: Sequence[tuple[str, str, str]]) -> list[str]:
    notes = []
    if not any(job.merged for job in jobs):
        notes.append("No tensor goes through the method: the output is a copy of the first model.")
    heads = [f"{name} of {reference}" for reference, name, _ in left_out if ties.is_head(name)]
    if heads:
        notes.append(f"{', '.join(heads)} is left out: the first model ties its head to its embedding.")
    return notes
