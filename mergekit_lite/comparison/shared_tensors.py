"""Which tensors of several models are the same one; for looking at them, what can't be compared is told, no error.

A head that a model ties to its embedding is compared by that embedding. Where one vocabulary has more rows than
another, the rows that all models have are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, tied_weights
from mergekit_lite.errors import PlanError
from mergekit_lite.planning.matching import is_buffer
from mergekit_lite.recipe.layers import place, stacks


@dataclass(frozen=True)
class Match:
    """One tensor of all models.

    Attributes:
        name: of the tensor.
        shape: of what is compared.
        specs: the first model's tensor, then the others'.
        stack, layer: the layer it belongs to; None where it is outside the layers.
        module: its name within the layer without ``.weight``, experts counted as one: ``mlp.experts.*.up_proj``.
    """

    name: str
    shape: tuple[int, ...]
    specs: tuple[TensorSpec, ...]
    stack: str | None = None
    layer: int | None = None
    module: str = ""

    @property
    def numel(self) -> int:
        """Elements that are compared."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(self.numel * dtypes.size(spec.stored_dtype) for spec in self.specs)

    @property
    def row(self) -> int:
        """Elements in a row: of the last dimension, all of them in a vector."""
        return self.shape[-1] if len(self.shape) > 1 else self.numel


@dataclass(frozen=True)
class Unmatched:
    """A tensor that is not compared, and why."""

    model: str
    name: str
    why: str


def match(models: Sequence[Checkpoint]) -> tuple[list[Match], list[Unmatched], list[str]]:
    """Find the tensors that all models have.

    Args:
        models: the first one's tensors give order and names.

    Returns:
        What can be compared, in the order of the first model's files; what can't; and what the user should know.

    Raises:
        PlanError: nothing can be compared.
    """
    first = models[0]
    depth = stacks(first.tensors)
    found: list[Match] = []
    left: list[Unmatched] = []
    notes: list[str] = []
    for name, specs in alike(models):
        owner = next(model for model in models if name in model.tensors)
        if problem := _why_not(name, specs, models):
            left.append(Unmatched(owner.reference, name, problem))
            continue
        whole = tuple(filter(None, specs))
        notes += [
            f"{name} is compared with {spec.name} of {model.reference}, which ties it"
            for spec, model in zip(whole, models, strict=True)
            if spec.name != name
        ]
        shape = min((spec.shape for spec in whole), key=lambda shape: shape[:1])
        if len({spec.shape for spec in whole}) > 1:
            notes.append(f"{name}: the first {shape[0]:,} rows are compared, not all models have more")
        found.append(_placed(name, shape, whole, depth))
    left += [Unmatched(first.reference, name, why) for name, why in first.left_out.items()]
    if not found:
        reasons = [f"{one.name} of {one.model}: {one.why}" for one in left] or ["there are no tensors"]
        raise PlanError(["no tensor of these models can be compared", *reasons])
    return found, left, notes


def alike(models: Sequence[Checkpoint]) -> Iterator[tuple[str, tuple[TensorSpec | None, ...]]]:
    """Every tensor that any of the models has: its name, and what each model has of it.

    That is None where a model lacks it, and the embedding for a head that the model ties to it. The first model gives
    the order; what it doesn't have comes last.
    """
    for name in dict.fromkeys(name for model in models for name in model.tensors):
        yield name, tuple(tied_weights.counterpart(name, model.tensors) for model in models)


def alone(model: Checkpoint) -> list[Match]:
    """The float tensors of one model."""
    depth = stacks(model.tensors)
    floats = (spec for spec in model.tensors.values() if dtypes.is_float(spec.dtype) and spec.numel)
    return [_placed(spec.name, spec.shape, (spec,), depth) for spec in floats]


def module_of(rest: str) -> str:
    """A tensor's name within its layer, the same for all experts and without ``.weight``."""
    parts = ["*" if part.isdigit() else part for part in rest.removesuffix(".weight").split(".")]
    return ".".join(parts)


def _placed(name: str, shape: tuple[int, ...], specs: tuple[TensorSpec, ...], depth: Mapping[str, int]) -> Match:
    at = place(name)
    if at is None or at.stack not in depth:
        return Match(name, shape, specs, module=module_of(name))
    return Match(name, shape, specs, at.stack, at.layer, module_of(at.rest))


def _why_not(name: str, specs: Sequence[TensorSpec | None], models: Sequence[Checkpoint]) -> str:
    """Why a tensor can't be compared; empty where it can."""
    first = next(spec for spec in specs if spec is not None)
    for spec, model in zip(specs, models, strict=True):
        if spec is None:
            buffer = " (a buffer, computed on loading)" if is_buffer(name) else ""
            return f"is missing in {model.reference}{buffer}"
        if not dtypes.is_float(spec.dtype):
            return f"is {spec.dtype} in {model.reference}, which is not for arithmetic"
        if not spec.numel:
            return f"has no elements in {model.reference}"
        if spec.shape != first.shape and not _is_vocabulary(spec, first):
            return f"shape {list(first.shape)} here, {list(spec.shape)} in {model.reference}"
    return ""


def _is_vocabulary(spec: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors differ in nothing but the number of tokens."""
    alike = len(spec.shape) == len(other.shape) > 0 and spec.shape[1:] == other.shape[1:]
    return alike and tied_weights.is_vocabulary(spec.name)
