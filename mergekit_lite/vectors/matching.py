"""Which tensors of several models are the same one, for looking at: what can't be compared is told, never an error.

A head that a model ties to its embedding is compared by that embedding. Where one vocabulary has more rows than
another, the rows that all models have are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, ties
from mergekit_lite.errors import PlanError
from mergekit_lite.plan.matching import is_buffer
from mergekit_lite.recipe.layers import place, stacks


@dataclass(frozen=True)
class Match:
    """One tensor of all models.

    Attributes:
        name: in the first model.
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
    first, *others = models
    depth = stacks(first.tensors)
    found: list[Match] = []
    left: list[Unmatched] = []
    notes: list[str] = []
    used: list[set[str]] = [set() for _ in others]
    for spec in first.tensors.values():
        counterparts = [ties.counterpart(spec.name, other.tensors) for other in others]
        for names, other, counterpart in zip(used, others, counterparts, strict=True):
            if counterpart is not None:
                names.add(counterpart.name)
                if counterpart.name != spec.name:
                    notes.append(f"{spec.name} is compared with {counterpart.name} of {other.reference}, which ties it")
        specs = (spec, *filter(None, counterparts))
        if problem := _why_not(spec, counterparts, others):
            left.append(Unmatched(first.reference, spec.name, problem))
            continue
        shape = min((each.shape for each in specs), key=lambda shape: shape[:1])
        if len({each.shape for each in specs}) > 1:
            notes.append(f"{spec.name}: the first {shape[0]:,} rows are compared, not all models have more")
        found.append(_placed(spec.name, shape, specs, depth))
    left += [Unmatched(first.reference, name, why) for name, why in first.left_out.items()]
    for other, names in zip(others, used, strict=True):
        left += [
            Unmatched(other.reference, name, _why_spare(name, first)) for name in other.tensors if name not in names
        ]
    if not found:
        reasons = [f"{one.name} of {one.model}: {one.why}" for one in left] or ["there are no tensors"]
        raise PlanError(["no tensor of these models can be compared", *reasons])
    return found, left, notes


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


def _why_not(spec: TensorSpec, counterparts: Sequence[TensorSpec | None], others: Sequence[Checkpoint]) -> str:
    """Why a tensor can't be compared; empty where it can."""
    if not dtypes.is_float(spec.dtype):
        return f"{spec.dtype} is not for arithmetic"
    if not spec.numel:
        return "has no elements"
    for other, counterpart in zip(others, counterparts, strict=True):
        if counterpart is None:
            buffer = " (a buffer, computed on loading)" if is_buffer(spec.name) else ""
            return f"is missing in {other.reference}{buffer}"
        if not dtypes.is_float(counterpart.dtype):
            return f"is {spec.dtype} here, {counterpart.dtype} in {other.reference}"
        if counterpart.shape != spec.shape and not _is_vocabulary(spec, counterpart):
            return f"shape {list(spec.shape)} here, {list(counterpart.shape)} in {other.reference}"
    return ""


def _is_vocabulary(spec: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors differ in nothing but the number of tokens, and both have some."""
    alike = len(spec.shape) == len(other.shape) > 0 and spec.shape[1:] == other.shape[1:]
    return alike and ties.is_vocabulary(spec.name) and other.numel > 0


def _why_spare(name: str, first: Checkpoint) -> str:
    if ties.tied_to(name, first.tensors) is not None:
        return f"{first.reference} ties its head to its embedding"
    return "a buffer, computed on loading" if is_buffer(name) else f"is not in {first.reference}"
