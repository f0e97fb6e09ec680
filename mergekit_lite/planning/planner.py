"""Planning a merge recipe: any number of models, slices of their layers, a method and its numbers for every tensor."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.errors import CheckpointError, PlanError, counted, listing
from mergekit_lite.layout import is_single_file
from mergekit_lite.methods import METHODS, Method
from mergekit_lite.planning.configs import Origin, disagreements, relayered
from mergekit_lite.planning.jobs import Jobs, WrongNumbersError
from mergekit_lite.planning.matching import MismatchError, arranged
from mergekit_lite.planning.plan import Job, Plan
from mergekit_lite.planning.tokenizers import chat_template, foreign_vocabularies
from mergekit_lite.recipe import MergeRecipe, MethodParameters, Numbers, Output, resolve
from mergekit_lite.recipe import outputs as outputs_of

SHARD_SIZE = 5_000_000_000
MUST_AGREE = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "model_type")
SHOULD_AGREE = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "rms_norm_eps",
                "tie_word_embeddings", "vocab_size", "hidden_act", "bos_token_id", "eos_token_id")  # fmt: skip


def method_parameters() -> dict[str, MethodParameters]:
    """What each registered method takes, as the recipe language wants to know it."""
    return {name: _parameters_of(method) for name, method in METHODS.items()}


def _parameters_of(method: Method) -> MethodParameters:
    shared = {name: parameter for name, parameter in method.parameters.items() if not parameter.each}
    per_model = {name: parameter for name, parameter in method.parameters.items() if parameter.each}
    # A base with a number of its own is merged like any other model.
    merges_base = any(parameter.each == "input" for parameter in per_model.values())
    return MethodParameters(shared, per_model, "none" if merges_base else method.base, method.models)


@contextmanager
def _uncollected() -> Iterator[None]:
    """A plan is very many small objects that all stay: looking for garbage among them took a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def plan_merge(
    recipe: MergeRecipe,
    output: str | Path,
    *,
    shard_size: int | None = None,
    text: str = "",
    opened: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Resolve a merge recipe against its models' headers.

    Args:
        recipe: the recipe.
        output: a folder, or a ``.safetensors`` or ``.pt`` file.
        shard_size: most bytes of data in one file; by default the shards of the donor, or 5 GB where layers were moved.
        text: the recipe's own text, which travels with the output.
        opened: models that are open already, by reference.

    Raises:
        CheckpointError: models can't be opened.
        PlanError: the models or the recipe don't fit together; every problem is named.
    """
    inputs = _opened(recipe.models, opened or {})
    by_reference = dict(zip(recipe.models, inputs, strict=True))
    takes = method_parameters()
    found = outputs_of(recipe.slices, {model: list(source.tensors) for model, source in by_reference.items()})
    parts = [[recipe.models.index(source.model) for source in part.sources] for part in recipe.slices]
    making = Jobs(recipe, inputs, takes, parts)
    tensors = [making.with_ties(tensor) for tensor in found.tensors]
    resolved = resolve(recipe, tensors, takes)
    jobs, misfits = _jobs(making, tensors, resolved.numbers)
    problems = [*found.problems, *resolved.problems, *misfits]
    donor = recipe.models.index(_donor(recipe))
    problems += disagreements(MUST_AGREE, inputs, inputs[donor])
    tokenizer = _tokenizer(recipe, donor)
    foreign, notes_on_tokens = foreign_vocabularies(inputs, inputs[tokenizer])
    if foreign and recipe.tokenizer is not None:
        remedy = "rows are not moved to other tokens yet; without tokenizer_source they are merged as they stand"
        problems += [f"{text}: {remedy}" for text in foreign]
    template = chat_template(recipe.chat_template, inputs) if recipe.chat_template is not None else None
    if recipe.chat_template is not None and template is None:
        problems.append("chat_template: auto finds no template in any model: give a name or the template itself")
    if problems:
        raise PlanError(problems)
    path = Path(output).expanduser()
    moved = any(job.name not in inputs[donor].tensors for job in jobs)
    layout = arranged(jobs, inputs[donor], path, shard_size or (SHARD_SIZE if moved else None))
    origins = _origins(found.layers, recipe, tensors, parts) if found.layers is not None else None
    config, notes_on_config = relayered(inputs, donor, origins) if origins else (None, [])
    notes = [str(note) for note in (*recipe.notes, *resolved.notes)]
    notes += [f"{name}: the output is untied, its config says so" for name in making.tied]
    differing = disagreements(SHOULD_AGREE, inputs, inputs[donor])
    notes += [f"the configs differ, the output follows the first: {text}" for text in differing]
    notes += [f"{text}; rows are merged as they stand" for text in foreign] + notes_on_tokens + notes_on_config
    if is_single_file(path) and (template is not None or recipe.tokenizer is not None):
        notes.append("a single file has no tokenizer beside it: chat_template and tokenizer_source do nothing")
    return Plan(
        recipes=({"merge_method": recipe.merge_method, "text": text},),
        inputs=inputs,
        donor=donor,
        jobs=tuple(jobs),
        left_out=tuple(_left_out(inputs, jobs)),
        layout=layout,
        outputs=(path,),
        rounding=recipe.rounding,
        seed=recipe.seed,
        out_dtype=recipe.out_dtype or recipe.dtype,
        config=config,
        tokenizer=None if tokenizer == donor else tokenizer,
        chat_template=template,
        text=text,
        shard_size=shard_size,
        notes=tuple(notes),
    )


def _opened(references: Sequence[str], already: Mapping[str, Checkpoint]) -> tuple[Checkpoint, ...]:
    """Every model. Raises CheckpointError that tells of all that can't be opened."""
    opened: list[Checkpoint] = []
    wrong: list[CheckpointError] = []
    for reference in references:
        try:
            opened.append(already.get(reference) or open_checkpoint(reference))
        except CheckpointError as error:
            wrong.append(error)
    if len(wrong) > 1:
        raise CheckpointError(listing(f"{counted(len(wrong), 'model')} can't be opened", [str(each) for each in wrong]))
    if wrong:
        raise wrong[0]
    return tuple(opened)


def _jobs(making: Jobs, tensors: Sequence[Output], numbers: Sequence[Numbers | None]) -> tuple[list[Job], list[str]]:
    """The jobs of all tensors, and what is wrong; what a method says of many tensors is told once."""
    jobs: list[Job] = []
    problems: list[str] = []
    refused: dict[str, list[str]] = {}
    for tensor, made_with in zip(tensors, numbers, strict=True):
        try:
            jobs.append(making.job(tensor, made_with))
        except MismatchError as mismatch:
            problems.append(str(mismatch))
        except WrongNumbersError as wrong:
            refused.setdefault(str(wrong), []).append(tensor.spot.name)
    for reason, names in refused.items():
        more = f" and {counted(len(names) - 1, 'more tensor')}" if len(names) > 1 else ""
        problems.append(f"{names[0]}{more}: {reason}")
    return jobs, problems


def _donor(recipe: MergeRecipe) -> str:
    """The model that gives config and tokenizer: the base, but for methods that only take a delta from it."""
    if METHODS[recipe.merge_method].donor == "model":
        return next((model for model in recipe.models if model != recipe.base_model), recipe.donor)
    return recipe.donor


def _tokenizer(recipe: MergeRecipe, donor: int) -> int:
    """Which of the models gives the tokenizer."""
    if recipe.tokenizer is None:
        return donor
    return recipe.models.index(recipe.donor if recipe.tokenizer == "base" else recipe.tokenizer)


def _origins(
    layers: int, recipe: MergeRecipe, tensors: Sequence[Output], parts: Sequence[Sequence[int]]
) -> list[Origin]:
    """Where each layer of the output is from: of several sources the base, else the first."""
    origins: dict[int, Origin] = {}
    for tensor in tensors:
        if tensor.spot.layer is not None:
            base = recipe.slices[tensor.part].base
            made = next((made for made in tensor.inputs if made.source == base), tensor.inputs[0])
            assert made.spot.layer is not None
            origins[tensor.spot.layer] = (parts[tensor.part][made.source], made.spot.layer)
    return [origins[layer] for layer in range(layers)]


def _left_out(inputs: Sequence[Checkpoint], jobs: Sequence[Job]) -> Iterator[tuple[str, str, str]]:
    """What no tensor of the output is made of, and why."""
    read = {(model, spec.name) for job in jobs for model, spec in zip(job.models, job.inputs, strict=True)}
    copied_from = {job.name: f"{job.why}: copied from {inputs[job.models[0]].reference}" for job in jobs if job.why}
    for number, source in enumerate(inputs):
        for name in source.tensors:
            if (number, name) not in read:
                yield source.reference, name, copied_from.get(name, "no tensor of the output is made of it")
    for source in inputs:
        yield from ((source.reference, name, why) for name, why in source.left_out.items())
