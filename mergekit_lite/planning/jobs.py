"""The jobs of a merge recipe: what each output tensor is made of, by which method, with which numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, tied_weights
from mergekit_lite.errors import UsageError
from mergekit_lite.methods import METHODS
from mergekit_lite.planning.matching import MismatchError, copied, is_buffer, output_dtype
from mergekit_lite.planning.plan import Job
from mergekit_lite.recipe import MergeRecipe, MethodParameters, Numbers, Output
from mergekit_lite.recipe.layers import Input
from mergekit_lite.recipe.rules import Spot

Arguments = Mapping[str, Any]


class WrongNumbersError(Exception):
    """A method refuses the numbers of a tensor; the message says what it says."""


@dataclass
class Jobs:
    """What the jobs of one recipe have in common.

    Attributes:
        recipe: the recipe.
        inputs: its models, opened.
        takes: what each method takes.
        parts: for each slice which of the inputs its sources are.
        tied: is told of each head that an embedding stands in for.
        known: arguments that were found sound, or what is wrong with them; tensors with equal numbers share them.
    """

    recipe: MergeRecipe
    inputs: Sequence[Checkpoint]
    takes: Mapping[str, MethodParameters]
    parts: Sequence[Sequence[int]]
    tied: list[str] = field(default_factory=list)
    known: dict[object, tuple[Numbers, tuple[Arguments, ...] | str]] = field(default_factory=dict)

    def with_ties(self, tensor: Output) -> Output:
        """The output tensor with the embedding of each source that ties its head to it."""
        if not tied_weights.is_head(tensor.spot.name):
            return tensor
        found = {made.source: made for made in tensor.inputs}
        for index, model in enumerate(self.parts[tensor.part]):
            embedding = tied_weights.tied_to(tensor.spot.name, self.inputs[model].tensors)
            if index not in found and embedding is not None:
                found[index] = Input(index, Spot(embedding.name))
                reference = self.inputs[model].reference
                self.tied.append(f"{reference} ties {tensor.spot.name} to {embedding.name}, other models don't")
        return tensor._replace(inputs=tuple(found[index] for index in sorted(found)))

    def job(self, tensor: Output, numbers: Numbers | None) -> Job:
        """The job of one output tensor. Raises MismatchError or WrongNumbersError."""
        part, name, models = self.recipe.slices[tensor.part], tensor.spot.name, self.parts[tensor.part]
        specs = {made.source: self.inputs[models[made.source]].tensors[made.spot.name] for made in tensor.inputs}
        first = part.base if part.base is not None and part.base in specs else min(specs)
        spec = specs[first]
        asked = self.recipe.out_dtype or self.recipe.dtype
        if numbers is None:
            return replace(copied(spec, models[first], output_dtype(spec, asked), "excluded"), name=name)
        missing = [self.inputs[model].reference for index, model in enumerate(models) if index not in specs]
        why = "" if dtypes.is_float(spec.dtype) else f"{spec.dtype} is not for arithmetic"
        if missing and is_buffer(name):
            why = "a buffer not all models have"
        elif missing and not why:
            raise MismatchError(f"{name}: is missing in {', '.join(missing)}")
        else:
            for index, other in specs.items():
                _check_alike(name, spec, other, self.inputs[models[index]].reference)
        if why:
            return replace(copied(spec, models[first], output_dtype(spec, asked), why), name=name)
        has_base = part.base is not None and self.takes[numbers.merge_method].base != "none"
        order = [index for index in specs if not (has_base and index == part.base)]
        parameters = self._arguments(numbers, tuple(order), has_base)
        order += [first] if has_base else []
        return Job(
            name,
            spec.shape,
            asked or dtypes.promoted(output_dtype(specs[index], None) for index in order),
            tuple([specs[index] for index in order]),
            tuple([models[index] for index in order]),
            has_base=has_base,
            method=numbers.merge_method,
            parameters=parameters,
            merged=spec.numel,
        )

    def _arguments(self, numbers: Numbers, order: tuple[int, ...], has_base: bool) -> tuple[Arguments, ...]:
        """The method's parameters; those of each model as a tuple, in the order of the job's inputs."""
        key = (id(numbers), order, has_base)
        if key not in self.known:
            arguments: dict[str, Any] = {
                name: tuple(numbers.per_model[index][name] for index in order) for name in numbers.per_model[order[0]]
            }
            arguments |= {name: value for name, value in numbers.shared.items() if value is not None}
            try:
                METHODS[numbers.merge_method].resolve(arguments, len(order), has_base)
                self.known[key] = numbers, (arguments,)
            except UsageError as wrong:
                self.known[key] = numbers, str(wrong)
        found = self.known[key][1]
        if isinstance(found, str):
            raise WrongNumbersError(found)
        return found


def _check_alike(name: str, spec: TensorSpec, other: TensorSpec, where: str) -> None:
    """Raise MismatchError where two models' tensors can't go into one."""
    if other.shape != spec.shape:
        hint = ": the vocabularies differ" if tied_weights.is_vocabulary(name) else ""
        raise MismatchError(f"{name}: shape {list(spec.shape)}, but {list(other.shape)} in {where}{hint}")
    if other.dtype != spec.dtype and not (dtypes.is_float(spec.dtype) and dtypes.is_float(other.dtype)):
        raise MismatchError(f"{name}: is {spec.dtype}, but {other.dtype} in {where}")
