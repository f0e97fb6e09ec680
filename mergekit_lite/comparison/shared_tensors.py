"""Shared tensors: those that several models have under one name, and why others can't be compared.

In place of a head that a model ties to its embedding stands that embedding. Where one vocabulary has more rows than
another, the rows that all models have are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, tied_weights
from mergekit_lite.checkpoint.naming.alignment import names_differ
from mergekit_lite.checkpoint.optional_tensors import why_optional
from mergekit_lite.errors import PlanError, said_once
from mergekit_lite.recipe.layers import place, stacks


@dataclass(frozen=True)
class SharedTensor:
    """One tensor that all models have.

    Attributes:
        name: its name.
        shape: shape of the part that is compared.
        specs: the first model's tensor, then the others'.
        stack, layer: the layer it belongs to; None where it is outside the layers.
        module: its name within the layer without ``.weight``, the same for all experts: ``mlp.experts.*.up_proj``.
    """

    name: str
    shape: tuple[int, ...]
    specs: tuple[TensorSpec, ...]
    stack: str | None = None
    layer: int | None = None
    module: str = ""

    @property
    def numel(self) -> int:
        """Number of elements that are compared."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes to read."""
        return sum(spec.stored_bytes(self.numel) for spec in self.specs)

    @property
    def row(self) -> int:
        """Number of elements in a row: the last dimension; all elements of a vector."""
        return self.shape[-1] if len(self.shape) > 1 else self.numel


@dataclass(frozen=True)
class Unmatched:
    """A tensor that is not compared, and the reason."""

    model: str
    name: str
    why: str


def shared_tensors(models: Sequence[Checkpoint]) -> tuple[list[SharedTensor], list[Unmatched], list[str]]:
    """Find the tensors that all models have.

    Args:
        models: at least one; the first one gives names and order.

    Returns:
        The tensors that can be compared, in the order of the first model's files; the others; and notes for the user.

    Raises:
        PlanError: no tensor can be compared; the reasons are named.
    """
    first = models[0]
    depth = stacks(first.tensors)
    shared: list[SharedTensor] = []
    unmatched: list[Unmatched] = []
    notes = [note for model in models for note in model.notes]
    for name, specs in tensors_by_name(models):
        owner = next(model for model in models if name in model.tensors)
        if problem := _why_not(name, specs, models):
            unmatched.append(Unmatched(owner.reference, name, problem))
            continue
        present = tuple(filter(None, specs))  # all of them: none is missing
        notes += [
            f"{name} is compared with {spec.name} of {model.reference}, which ties it"
            for spec, model in zip(present, models, strict=True)
            if spec.name != name
        ]
        shape = min((spec.shape for spec in present), key=lambda shape: shape[:1])
        if len({spec.shape for spec in present}) > 1:
            notes.append(f"{name}: the first {shape[0]:,} rows are compared, not all models have more")
        shared.append(_shared_tensor(name, shape, present, depth))
    strangers = [sentence for model in models[1:] if (sentence := names_differ(model, first))]
    notes += strangers
    unmatched += [Unmatched(first.reference, name, why) for name, why in first.left_out.items()]
    if not shared:
        reasons = strangers or said_once((f"{tensor.name} of {tensor.model}", tensor.why) for tensor in unmatched)
        raise PlanError(["no tensor of these models can be compared", *(reasons or ["there are no tensors"])])
    return shared, unmatched, notes


def tensors_by_name(models: Sequence[Checkpoint]) -> Iterator[tuple[str, tuple[TensorSpec | None, ...]]]:
    """Yield each name of a tensor in any of the models, and the tensor that each model has for it.

    For a head that a model ties to its embedding that is the embedding; None where the model has nothing. The order is
    the first model's; names that it doesn't have come last.
    """
    for name in dict.fromkeys(name for model in models for name in model.tensors):
        yield name, tuple(tied_weights.counterpart(name, model.tensors) for model in models)


def float_tensors(model: Checkpoint) -> list[SharedTensor]:
    """Return the float tensors of one model that aren't empty."""
    depth = stacks(model.tensors)
    floats = (spec for spec in model.tensors.values() if dtypes.is_float(spec.dtype) and spec.numel)
    return [_shared_tensor(spec.name, spec.shape, (spec,), depth) for spec in floats]


def module_name(rest: str) -> str:
    """Return a tensor's name within its layer without ``.weight``, with ``*`` for each number, as of an expert."""
    parts = ["*" if part.isdigit() else part for part in rest.removesuffix(".weight").split(".")]
    return ".".join(parts)


def _shared_tensor(
    name: str, shape: tuple[int, ...], specs: tuple[TensorSpec, ...], depth: Mapping[str, int]
) -> SharedTensor:
    """Return the tensor with its place among the layers; ``depth`` is the number of layers of each stack."""
    position = place(name)
    if position is None or position.stack not in depth:
        return SharedTensor(name, shape, specs, module=module_name(name))
    return SharedTensor(name, shape, specs, position.stack, position.layer, module_name(position.rest))


def _why_not(name: str, specs: Sequence[TensorSpec | None], models: Sequence[Checkpoint]) -> str:
    """Say why a tensor can't be compared; empty where it can."""
    first = next(spec for spec in specs if spec is not None)
    for spec, model in zip(specs, models, strict=True):
        if spec is None:
            having = next(each for each, held in zip(models, specs, strict=True) if held is not None)
            why = why_optional(name, first, having.tensors, having.config_of(name))
            return f"is missing in {model.reference}" + (f" ({why})" if why else "")
        if not dtypes.is_float(spec.dtype):
            return f"is {spec.dtype} in {model.reference}, which is not for arithmetic"
        if not spec.numel:
            return f"has no elements in {model.reference}"
        if spec.shape != first.shape and not _is_vocabulary(spec, first):
            return f"shape {list(first.shape)} here, {list(spec.shape)} in {model.reference}"
    return ""


def _is_vocabulary(spec: TensorSpec, other: TensorSpec) -> bool:
    """Return True where two tensors differ in nothing but the number of tokens."""
    same_width = len(spec.shape) == len(other.shape) > 0 and spec.shape[1:] == other.shape[1:]
    return same_width and tied_weights.is_vocabulary(spec.name)
