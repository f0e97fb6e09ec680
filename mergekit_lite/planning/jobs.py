"""The jobs of a recipe: what each output tensor is made of, by which method, with which numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mergekit_lite import block_fp8, dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, tied_weights
from mergekit_lite.checkpoint.optional_tensors import modules_alone, promises_head, why_optional
from mergekit_lite.errors import UsageError
from mergekit_lite.methods import METHODS
from mergekit_lite.planning.matching import MissingError, output_dtype, shared_elements
from mergekit_lite.planning.plan import Job
from mergekit_lite.recipe import Numbers, Output, Recipe
from mergekit_lite.recipe.rules import Spot

Arguments = Mapping[str, Any]
T = TypeVar("T")


class WrongNumbersError(Exception):
    """A method refuses the numbers of a tensor; the message says what it says."""


class LeftOutError(Exception):
    """A tensor of the models that the output doesn't have; the message says why."""


@dataclass
class Jobs:
    """What the jobs of one recipe have in common."""

    recipe: Recipe
    inputs: Sequence[Checkpoint]  # its models, opened
    parts: Sequence[Sequence[int]]  # for each slice which of the inputs its sources are
    config_source: int  # which of the inputs gives config and tokenizer
    # Whether the output continues the model that is merged (ExPO), not the base. Then that model decides which tensors
    # there are, in which dtypes, and with how many rows.
    continues: bool
    tied: list[str] = field(default_factory=list)  # a message for each head that an embedding stands in for
    # The modules that are copied, with the model that alone has them, and how many tensors each of them has.
    alone: Counter[tuple[str, str]] = field(default_factory=Counter)
    # For two inputs, the modules that the first has and the second lacks as a whole, by their tensors.
    towers: dict[tuple[int, int], Mapping[str, str]] = field(default_factory=dict)
    # Arguments that are sound, or what is wrong with them; tensors with equal numbers share them.
    known: dict[object, tuple[Numbers, Arguments | str]] = field(default_factory=dict)
    shared: dict[object, Any] = field(default_factory=dict)

    def with_ties(self, tensor: Output) -> Output:
        """Return the output tensor with the embedding of each source that ties its head, or another copy, to it.

        A model that the output continues gets no head where it has none.
        """
        if not tied_weights.may_be_tied(tensor.spot.name):
            return tensor
        spots = dict(tensor.inputs)
        base = self.recipe.slices[tensor.part].base
        for index, model in enumerate(self.parts[tensor.part]):
            embedding = tied_weights.tied_to(tensor.spot.name, self.inputs[model].tensors)
            if index not in spots and embedding is not None and (not self.continues or index == base):
                spots[index] = Spot(embedding.name)
                reference = self.inputs[model].reference
                if tied_weights.is_head(tensor.spot.name):
                    self.tied.append(f"{reference} ties {tensor.spot.name} to {embedding.name}, other models don't")
        sources = tuple(sorted(spots))
        return tensor._replace(sources=sources, spots=tuple(map(spots.__getitem__, sources)))

    def job(self, tensor: Output, numbers: Sequence[Numbers | None]) -> Job:
        """Return the job of one output tensor; ``numbers`` are for each output of the plan, None where it is copied.

        Raises LeftOutError, WrongNumbersError, and MismatchError where the models' tensors don't fit together.
        """
        part, name, models = self.recipe.slices[tensor.part], tensor.spot.name, self.parts[tensor.part]
        specs = {source: self.inputs[models[source]].tensors[spot.name] for source, spot in tensor.inputs}
        lead = self._lead(tensor, specs)
        spec = specs[lead]
        asked = self.recipe.out_dtype or self.recipe.dtype
        if asked == block_fp8.NAME:
            asked = block_fp8.BESIDE  # of all, until some are chosen to be quantised

        def copied_from(source: int, why: str) -> Job:
            copy = specs[source]
            return Job(name, output_dtype(copy, asked), copy.shape, (copy,), (models[source],), why=why)

        if why := self.recipe.why_copied(tensor.spot):
            return copied_from(next((index for index in specs if models[index] == self.config_source), lead), why)
        missing = [model for index, model in enumerate(models) if index not in specs]
        if missing and (optional := self._why_optional(name, spec, models[lead])):
            return copied_from(lead, f"not all models have it: {optional}")
        if missing and (module := self._tower(name, models[lead], missing)):
            if self.config_source in missing:
                raise LeftOutError(f"{self.inputs[self.config_source].reference} has no {module}")
            self.alone[module, self.inputs[models[lead]].reference] += 1
            return copied_from(lead, f"not all models have {module}")
        if missing and all(self._is_outside(name, model) for model in missing):
            return copied_from(lead, f"outside {', '.join(self.inputs[model].stands_for for model in missing)}")
        is_float = dtypes.is_float(spec.dtype)
        if missing and is_float:
            lacking = ", ".join(self.inputs[model].reference for model in missing)
            having = self.inputs[models[lead]].reference
            raise MissingError(name, f"is missing in {lacking}; exclude it to take it from {having} as it is")
        if is_float or not self.continues:
            rows = self.recipe.new_rows if self.continues else None
            others = [(other, self.inputs[models[index]].reference) for index, other in specs.items() if index != lead]
            merged = min([spec.numel, *(shared_elements(name, spec, *other, rows) for other in others)])
        if not is_float:
            return copied_from(lead, f"{spec.dtype} is not for arithmetic")
        method = next(each.merge_method for each in numbers if each is not None)
        if part.is_base_alone and not METHODS[method].merges_base:
            return copied_from(lead, "no model besides the base is listed")
        has_base = part.base is not None and not METHODS[method].merges_base
        order = [index for index in specs if not (has_base and index == part.base)]
        parameters = tuple(self._arguments(each, tuple(order), has_base) for each in numbers if each is not None)
        order += [index for index in specs if has_base and index == part.base]
        own = [output_dtype(specs[index], None) for index in ([lead] if self.continues else order)]
        return Job(
            name,
            asked or dtypes.promoted(own),
            spec.shape,
            tuple([specs[index] for index in order]),
            self._one(tuple([models[index] for index in order])),
            has_base=has_base,
            method=method,
            parameters=self._one(parameters, tuple(map(id, parameters))),
            merged_elements=merged,
        )

    def outside(self, name: str) -> Job:
        """Return the copy of a tensor of the model that gives the config, which is in no module of the recipe."""
        asked = self.recipe.out_dtype or self.recipe.dtype
        asked = block_fp8.BESIDE if asked == block_fp8.NAME else asked
        spec = self.inputs[self.config_source].tensors[name]
        why = "in no module of the recipe"
        return Job(name, output_dtype(spec, asked), spec.shape, (spec,), (self.config_source,), why=why)

    def _one(self, value: T, key: object = None) -> T:
        """Return the first value that was given with the same key: there are very many jobs and few different ones."""
        first: T = self.shared.setdefault(value if key is None else key, value)
        return first

    def _lead(self, tensor: Output, specs: Mapping[int, TensorSpec]) -> int:
        """Return the source that gives a tensor its shape: the base, else the first; or the model that is continued."""
        base = self.recipe.slices[tensor.part].base
        if not self.continues:
            return base if base is not None and base in specs else min(specs)
        if others := [index for index in specs if index != base]:
            return min(others)
        name, models = tensor.spot.name, [self.inputs[model] for model in self.parts[tensor.part]]
        model = next(model for index, model in enumerate(models) if index != base)
        if tied_weights.is_head(name) and tied_weights.tied_to(name, model.tensors) is not None:
            raise LeftOutError(f"{model.reference} ties its head to its embedding")
        having = min(specs)
        if why := self._why_optional(name, specs[having], self.parts[tensor.part][having]):
            raise LeftOutError(f"{model.reference} lacks it, {why}")
        if why := self.recipe.why_copied(tensor.spot):
            raise LeftOutError(f"{model.reference} lacks it, {why}")
        if tied_weights.is_head(name) and not promises_head(model.config):
            raise LeftOutError(f"{model.reference} is a model without such a head")
        if module := self._tower(name, self.parts[tensor.part][having], [self.config_source]):
            raise LeftOutError(f"{model.reference} has no {module}")
        lacking = f"is in {models[having].reference}, but not in {model.reference}"
        raise MissingError(name, f"{lacking}; exclude it to go on without it")

    def _is_outside(self, name: str, model: int) -> bool:
        """Return whether an input stands for a part of the output that a tensor isn't in."""
        part = self.inputs[model].stands_for
        return bool(part) and not name.startswith(part)

    def _why_optional(self, name: str, spec: TensorSpec, model: int) -> str | None:
        """Return why other models can do without a tensor that input ``model`` has; None where they can't."""
        source = self.inputs[model]
        return why_optional(name, spec, source.tensors, source.config_of(name))

    def _tower(self, name: str, having: int, lacking: Sequence[int]) -> str | None:
        """Return the module of a tensor where it belongs to a modality that other models lack: ``vision_tower``.

        None where it doesn't, or their configs don't say so.
        """
        modules = [self._modules_alone(having, model).get(name) for model in lacking]
        return modules[0] if all(modules) else None

    def _modules_alone(self, having: int, lacking: int) -> Mapping[str, str]:
        if (having, lacking) not in self.towers:
            one, other = self.inputs[having], self.inputs[lacking]
            self.towers[having, lacking] = modules_alone(one.tensors, one.config, other.tensors, other.config)
        return self.towers[having, lacking]

    def _arguments(self, numbers: Numbers, order: tuple[int, ...], has_base: bool) -> Arguments:
        """Return the method's parameters; those of each model as a tuple, in the order of the job's inputs."""
        key = (id(numbers), order, has_base)
        if key not in self.known:
            arguments: dict[str, Any] = {
                name: tuple(numbers.per_model[index][name] for index in order) for name in numbers.per_model[order[0]]
            }
            arguments |= {name: value for name, value in numbers.shared.items() if value is not None}
            try:
                METHODS[numbers.merge_method].resolve(arguments, len(order), has_base)
                self.known[key] = numbers, arguments
            except UsageError as wrong:
                self.known[key] = numbers, str(wrong)
        sound = self.known[key][1]
        if isinstance(sound, str):
            raise WrongNumbersError(sound)
        return sound
