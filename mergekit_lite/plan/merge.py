"""Planning a merge recipe: any number of models, slices of their layers, a method and its numbers for every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, open_checkpoint, ties
from mergekit_lite.errors import PlanError, UsageError
from mergekit_lite.methods import METHODS, Method
from mergekit_lite.plan.matching import MismatchError, arranged, copied, is_buffer, output_dtype
from mergekit_lite.plan.plan import Job, Plan
from mergekit_lite.recipe import MergeRecipe, MethodParameters, Numbers, Output, Parameter, resolve
from mergekit_lite.recipe import outputs as outputs_of
from mergekit_lite.recipe.layers import Input
from mergekit_lite.recipe.rules import Spot

SHARD_SIZE = 5_000_000_000
MUST_AGREE = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "model_type")
SHOULD_AGREE = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "rms_norm_eps",
                "tie_word_embeddings", "vocab_size", "hidden_act", "bos_token_id", "eos_token_id")  # fmt: skip


def method_parameters() -> dict[str, MethodParameters]:
    """What each registered method takes, as the recipe language wants to know it."""
    return {name: _parameters_of(method) for name, method in METHODS.items()}


def _parameters_of(method: Method) -> MethodParameters:
    shared: dict[str, Parameter] = {}
    per_model: dict[str, Parameter] = {}
    base = method.base
    for name, parameter in method.parameters.items():
        marks = getattr(parameter.annotation, "__metadata__", ())
        default = parameter.default
        if marks:
            single = default[0] if isinstance(default, tuple) else default
            per_model[name] = Parameter.of(get_args(get_args(parameter.annotation)[0])[0], single)
            base = "none" if "input" in marks else base  # a base with a number of its own is merged like any other
        else:
            shared[name] = Parameter.of(parameter.annotation, default)
    return MethodParameters(shared, per_model, base, method.models)


def plan_merge(recipe: MergeRecipe, output: str | Path, *, shard_size: int | None = None, text: str = "") -> Plan:
    """Resolve a merge recipe against its models' headers.

    Args:
        recipe: the recipe.
        output: a folder, or a ``.safetensors`` or ``.pt`` file.
        shard_size: most bytes of data in one file; by default the shards of the donor, or 5 GB where layers were moved.
        text: the recipe's own text, which enters the manifest and the model card.

    Raises:
        CheckpointError: a model can't be opened.
        PlanError: the models or the recipe don't fit together; every problem is named.
    """
    inputs = tuple(open_checkpoint(model) for model in recipe.models)
    by_reference = dict(zip(recipe.models, inputs, strict=True))
    takes = method_parameters()
    found = outputs_of(recipe.slices, {model: list(source.tensors) for model, source in by_reference.items()})
    tied: list[str] = []
    parts = [[recipe.models.index(source.model) for source in part.sources] for part in recipe.slices]
    tensors = [_with_ties(tensor, parts[tensor.part], inputs, tied) for tensor in found.tensors]
    resolved = resolve(recipe, tensors, takes)
    problems = [*found.problems, *resolved.problems]
    if recipe.chat_template is not None:
        problems.append("chat_template is not supported yet: remove it, and put the template beside the result")
    jobs: list[Job] = []
    for tensor, numbers in zip(tensors, resolved.numbers, strict=True):
        try:
            jobs.append(_job(recipe, tensor, parts[tensor.part], numbers, inputs, takes))
        except MismatchError as mismatch:
            problems.append(str(mismatch))
    donor = recipe.models.index(_donor(recipe))
    problems += _disagreements(MUST_AGREE, inputs, inputs[donor])
    if problems:
        raise PlanError(problems)
    path = Path(output).expanduser()
    moved = any(job.name not in inputs[donor].tensors for job in jobs)
    layout = arranged(jobs, inputs[donor], path, shard_size or (SHARD_SIZE if moved else None))
    read = {(model, spec.name) for job in jobs for model, spec in zip(job.models, job.inputs, strict=True)}
    copied_from = {job.name: f"{job.why}: copied from {inputs[job.models[0]].reference}" for job in jobs if job.why}
    left_out = [
        (source.reference, name, copied_from.get(name, "no tensor of the output is made of it"))
        for number, source in enumerate(inputs)
        for name in source.tensors
        if (number, name) not in read
    ]
    left_out += [(source.reference, name, why) for source in inputs for name, why in source.left_out.items()]
    notes = [str(note) for note in (*recipe.notes, *resolved.notes)]
    notes += [f"{name}: the output is untied, its config says so" for name in tied]
    differing = _disagreements(SHOULD_AGREE, inputs, inputs[donor])
    notes += [f"the configs differ, the output follows the first: {text}" for text in differing]
    return Plan(
        recipes=({"merge_method": recipe.merge_method, "text": text},),
        inputs=inputs,
        donor=donor,
        jobs=tuple(jobs),
        left_out=tuple(left_out),
        layout=layout,
        outputs=(path,),
        rounding=recipe.rounding,
        seed=recipe.seed,
        out_dtype=recipe.out_dtype or recipe.dtype,
        layers=found.layers,
        notes=tuple(notes),
    )


def _donor(recipe: MergeRecipe) -> str:
    """The model that gives config and tokenizer: the base, but for methods that only take a delta from it."""
    if METHODS[recipe.merge_method].donor == "model":
        return next((model for model in recipe.models if model != recipe.base_model), recipe.donor)
    return recipe.donor


def _with_ties(tensor: Output, models: Sequence[int], inputs: Sequence[Checkpoint], tied: list[str]) -> Output:
    """The output tensor with the embedding of each source that ties its head to it; noted in ``tied``.

    ``models`` says for each source of the tensor's slice which of the inputs it is.
    """
    found = {made.source: made for made in tensor.inputs}
    for index, model in enumerate(models):
        embedding = ties.tied_to(tensor.spot.name, inputs[model].tensors)
        if index not in found and embedding is not None:
            found[index] = Input(index, Spot(embedding.name))
            reference = inputs[model].reference
            tied.append(f"{reference} ties {tensor.spot.name} to {embedding.name}, other models don't")
    return tensor._replace(inputs=tuple(found[index] for index in sorted(found)))


def _job(
    recipe: MergeRecipe,
    tensor: Output,
    models: Sequence[int],
    numbers: Numbers | None,
    inputs: Sequence[Checkpoint],
    takes: Mapping[str, MethodParameters],
) -> Job:
    """The job of one output tensor. Raises MismatchError where its inputs don't agree."""
    part, name = recipe.slices[tensor.part], tensor.spot.name
    specs = {made.source: inputs[models[made.source]].tensors[made.spot.name] for made in tensor.inputs}
    first = part.base if part.base is not None and part.base in specs else min(specs)
    spec = specs[first]
    asked = recipe.out_dtype or recipe.dtype

    def copy(why: str) -> Job:
        return replace(copied(spec, models[first], output_dtype(spec, asked), why), name=name)

    if numbers is None:
        return copy("excluded")
    if not dtypes.is_float(spec.dtype):
        return copy(f"{spec.dtype} is not for arithmetic")
    missing = [inputs[models[index]].reference for index in range(len(models)) if index not in specs]
    if missing and is_buffer(name):
        return copy("a buffer not all models have")
    if missing:
        raise MismatchError(f"{name}: is missing in {', '.join(missing)}")
    for index, other in specs.items():
        where = inputs[models[index]].reference
        if other.shape != spec.shape:
            hint = ": the vocabularies differ" if ties.is_vocabulary(name) else ""
            raise MismatchError(f"{name}: shape {list(spec.shape)}, but {list(other.shape)} in {where}{hint}")
        if not dtypes.is_float(other.dtype):
            raise MismatchError(f"{name}: is {spec.dtype}, but {other.dtype} in {where}")
    has_base = part.base is not None and takes[numbers.merge_method].base != "none"
    order = [index for index in sorted(specs) if not (has_base and index == part.base)]
    parameters = _arguments(METHODS[numbers.merge_method], name, numbers, order, has_base)
    order += [first] if has_base else []
    return Job(
        name,
        spec.shape,
        asked or _promoted([specs[index] for index in order]),
        tuple(specs[index] for index in order),
        tuple(models[index] for index in order),
        has_base=has_base,
        method=numbers.merge_method,
        parameters=(parameters,),
        merged=spec.numel,
    )


def _arguments(method: Method, name: str, numbers: Numbers, order: Sequence[int], has_base: bool) -> dict[str, Any]:
    """The method's parameters for one tensor; those of each model as a tuple, in the order of the job's inputs."""
    arguments: dict[str, Any] = {key: value for key, value in numbers.shared.items() if value is not None}
    for key in numbers.per_model[order[0]]:
        arguments[key] = tuple(numbers.per_model[index][key] for index in order)
    try:
        method.resolve(arguments, len(order), has_base)
    except UsageError as wrong:
        raise MismatchError(f"{name}: {wrong}") from wrong
    return arguments


def _promoted(specs: Sequence[TensorSpec]) -> str:
    """The dtype that holds all inputs: their own where they agree."""
    kinds = {output_dtype(spec, None) for spec in specs}
    if len(kinds) == 1:
        return kinds.pop()
    return "float64" if "float64" in kinds else "float32"


def _disagreements(keys: Sequence[str], inputs: Sequence[Checkpoint], donor: Checkpoint) -> list[str]:
    """Where the inputs' configs differ from the donor's, which the output takes over."""
    own = donor.config or {}
    return [
        f"{key}: {json.dumps(own[key])} in {donor.reference}, {json.dumps(source.config[key])} in {source.reference}"
        for source in inputs
        for key in keys
        if source.config is not None and key in own and key in source.config and source.config[key] != own[key]
    ]
