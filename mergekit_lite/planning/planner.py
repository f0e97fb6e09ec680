"""Planning a recipe: any number of models, slices of their layers, a method and its numbers for every tensor."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from mergekit_lite import block_fp8
from mergekit_lite.checkpoint import Checkpoint, open_checkpoint, tied_weights
from mergekit_lite.checkpoint.naming.alignment import as_part, names_differ, shown_as, unwrapped
from mergekit_lite.checkpoint.optional_tensors import layers_promised
from mergekit_lite.checkpoint.tokenizer_file import Tokenizer, read_tokenizers
from mergekit_lite.errors import CheckpointError, PlanError, UsageError, counted, listing, nearest, said_once
from mergekit_lite.layout import OutputPath, is_single_file, output_path
from mergekit_lite.methods import METHODS, method_named
from mergekit_lite.options import named_options
from mergekit_lite.planning.configs import Origin, disagreements, giving_config, relayered
from mergekit_lite.planning.fp8 import quantised_jobs
from mergekit_lite.planning.front_matter import carried_over
from mergekit_lite.planning.jobs import Jobs, LeftOutError, WrongNumbersError
from mergekit_lite.planning.matching import REMEDY, MismatchError, MissingError, arranged
from mergekit_lite.planning.modules import Modules, config_of_modules, outputs_of_modules
from mergekit_lite.planning.plan import Job, Plan
from mergekit_lite.planning.statistics import with_statistics
from mergekit_lite.planning.token_numbers import SPECIAL_NUMBERS, with_numbers_of
from mergekit_lite.planning.tokenizers import chat_template, foreign_vocabularies, tokenizer_config
from mergekit_lite.planning.unions import examined, having_all_tokens
from mergekit_lite.planning.vocabularies import Aligned, VocabularyError, aligned, of_one_vocabulary
from mergekit_lite.recipe import Numbers, Output, Recipe, as_data, resolve
from mergekit_lite.recipe import outputs as outputs_of
from mergekit_lite.recipe.recipe import BASE, UNION, Vocabulary
from mergekit_lite.recipe.rules import Filter

SHARD_SIZE = 5_000_000_000
MUST_AGREE = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "model_type", "_class_name")
SHOULD_AGREE = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "rms_norm_eps",
                "tie_word_embeddings", "vocab_size", "hidden_act", "bos_token_id", "eos_token_id")  # fmt: skip


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switch the search for garbage off: a plan is many small objects that stay, and it took a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@named_options
@_uncollected()
def make_plan(
    recipe: Recipe,
    outputs: Sequence[str | OutputPath],
    *,
    shard_size: int | None = None,
    copy_code: bool = False,
    text: str = "",
    opened: Mapping[str, Checkpoint] | None = None,
    strict: bool = False,
) -> Plan:
    """Resolve a recipe against its models' headers.

    Args:
        recipe: the recipe.
        outputs: a path for each of its outputs: a folder, or a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file;
            or the URL of such a place in an object store.
        shard_size: most bytes of data in one file; by default the shards of the model that gives the config, or 5 GB
            where layers were moved or that model is in pieces.
        copy_code: copy the model's own code, which its config names, with its configs.
        text: the recipe's own text, which travels with the output.
        opened: models that are open already, by reference.
        strict: refuse filters that match no tensor; otherwise they are notes of the plan.

    Raises:
        UsageError: the recipe names a method or a parameter that is not known.
        CheckpointError: models can't be opened.
        PlanError: the models or the recipe don't fit together; every problem is named.
    """
    _check(recipe, outputs, shard_size)
    recipe = _with_exclusions(recipe)
    opened_inputs = opened_models(recipe.models, opened or {})
    listed_source = recipe.models.index(recipe.config_source)
    config_source, notes_on_gguf = giving_config(opened_inputs, listed_source)
    if (part := opened_inputs[config_source]).stands_for:
        needs = "is a part of a model, and the output needs a whole one: name that as base_model"
        raise PlanError([f"{part.reference}: {needs}"])
    inputs = _under_one_naming(opened_inputs, config_source)
    read = read_tokenizers(inputs) if recipe.tokenizer is not None else []
    tokenizer = _tokenizer(recipe, read, config_source)
    vocabulary, problems_of_rows = _with_one_vocabulary(recipe, inputs, read, tokenizer)
    inputs = vocabulary.inputs if vocabulary is not None else inputs
    del read  # a hundred bytes and more for each token
    names = {model: list(each.tensors) for model, each in zip(recipe.models, inputs, strict=True)}
    promised = {model: layers_promised(each.config) for model, each in zip(recipe.models, inputs, strict=True)}
    if recipe.modules:
        modules = outputs_of_modules(recipe, inputs, listed_source, promised)
        layered = modules.outputs
    else:
        modules = None
        layered = outputs_of(recipe.slices, names, recipe.config_source, promised)
    parts = [[recipe.models.index(source.model) for source in part.sources] for part in recipe.slices]
    making = Jobs(recipe, inputs, parts, listed_source, METHODS[recipe.merge_method].config_source == "model")
    tensors = [making.with_ties(tensor) for tensor in layered.tensors]
    resolved = [resolve(alone, tensors) for alone in recipe.for_outputs]
    jobs, spare, misfits = _jobs(making, tensors, list(zip(*(each.numbers for each in resolved), strict=True)))
    if modules is not None:
        jobs += [making.outside(name) for name in modules.outside]
    jobs, statistics, unfit = with_statistics(
        recipe, jobs, opened_inputs, inputs, opened or {}, rows_move=vocabulary is not None
    )
    problems = disagreements(MUST_AGREE, inputs, config_source)  # first: most of what follows may come of it
    problems += [*layered.problems, *dict.fromkeys(text for each in resolved for text in each.problems), *misfits]
    problems += unfit
    paths = tuple(map(output_path, outputs))
    is_folder = not is_single_file(paths[0])
    if recipe.out_dtype == block_fp8.NAME:
        jobs = quantised_jobs(jobs)
        problems += _not_fp8(jobs, inputs[config_source], is_folder)
    problems += _unmatched(recipe, tensors) if strict else []
    problems += _of_several(recipe, inputs[config_source], outputs)
    problems += problems_of_rows
    foreign, notes_on_tokens = foreign_vocabularies(inputs, inputs[tokenizer]) if vocabulary is None else ([], [])
    template = chat_template(recipe.chat_template, inputs) if recipe.chat_template is not None else None
    if is_folder and template is not None:
        tokenizer_config(inputs[tokenizer])  # the template is written into it, so it has to be readable
    front_matter, notes_on_card = carried_over(inputs[config_source]) if is_folder else ({}, [])
    if problems:
        raise PlanError(problems)
    origins = _origins(layered.layers, recipe, tensors, parts) if layered.layers is not None else None
    of_modules = _origins_of_modules(modules, recipe, tensors, parts) if modules is not None else {}
    del layered, tensors  # as large as the jobs that were made of them
    moved = any(job.name not in inputs[config_source].tensors for job in jobs)
    own_shards = inputs[config_source].in_shards and not moved
    layout = arranged(jobs, inputs[config_source], paths[0], shard_size or (None if own_shards else SHARD_SIZE))
    config, notes_on_config = relayered(inputs, config_source, origins) if origins else (None, [])
    if of_modules:
        config, notes_on_config = config_of_modules(recipe, inputs, config_source, of_modules)
    if modules is not None and modules.outside:
        notes_on_config.append(_told_outside(modules.outside, inputs[config_source]))
    is_settled = vocabulary is not None or tokenizer != config_source
    if is_settled and (written := config or inputs[config_source].config) is not None:
        rows, numbers = (vocabulary.rows, vocabulary.numbers(config_source)) if vocabulary is not None else (None, None)
        config = with_numbers_of(written, inputs[tokenizer].config or {}, rows, numbers)
    notes = [str(note) for note in dict.fromkeys([*recipe.notes, *(note for each in resolved for note in each.notes)])]
    notes += [note for each in inputs for note in each.notes]
    notes += _notes_on_jobs(jobs, spare, making.alone, inputs[config_source])
    notes += [f"{name}: the output is untied, its config says so" for name in making.tied]
    settled = (*SPECIAL_NUMBERS * is_settled, *("vocab_size",) * (vocabulary is not None))
    differing = disagreements([key for key in SHOULD_AGREE if key not in settled], inputs, config_source)
    notes += [f"the configs differ, the output follows the first: {text}" for text in differing]
    notes += [f"{text}; rows are merged as they stand: {REMEDY}" for text in foreign] + notes_on_tokens
    notes += [*(vocabulary.notes if vocabulary is not None else ()), *notes_on_config]
    notes += notes_on_card
    if variants := sorted({part.variant for part in inputs[config_source].parts} - {""}):
        plain = f"the output's files have no variant in their names: load it without variant={variants[0]!r}"
        notes += [f"{inputs[config_source].reference} is the variant {', '.join(variants)}; {plain}"] * is_folder
    notes += notes_on_gguf if is_folder else []
    if recipe.chat_template is not None and template is None:
        notes.append("chat_template: auto finds no template in any model and has no effect")
    if not is_folder and (template is not None or recipe.tokenizer is not None):
        notes.append("a single file has no tokenizer beside it: chat_template and tokenizer_source do nothing")
    written = {"merge_method": recipe.merge_method, "text": text}
    return Plan(
        recipes=tuple(written if text else as_data(alone) for alone in recipe.for_outputs),
        inputs=(*inputs, *statistics),
        statistics=len(statistics),
        config_source=config_source,
        jobs=tuple(jobs),
        left_out=tuple(_left_out(inputs, jobs, spare)),
        layout=layout,
        outputs=paths,
        rounding=recipe.rounding,
        seed=recipe.seed,
        out_dtype=recipe.out_dtype or recipe.dtype,
        config=config,
        tokenizer=None if tokenizer == config_source else tokenizer,
        added_tokens=vocabulary.more.entries if vocabulary is not None else (),
        chat_template=template,
        front_matter=front_matter,
        text=text,
        shard_size=shard_size,
        copy_code=copy_code,
        notes=tuple(notes),
    )


def _check(recipe: Recipe, outputs: Sequence[str | OutputPath], shard_size: int | None) -> None:
    """Raise UsageError where outputs can't be named, models are missing, or a method or parameter is not known."""
    if len(outputs) != len(recipe.for_outputs):
        raise UsageError(f"The recipe makes {counted(len(recipe.for_outputs), 'output')}, got {len(outputs)} paths.")
    if not recipe.slices or not all(part.sources for part in recipe.slices):
        raise UsageError("The recipe has no models, or a slice of it has none.")
    if shard_size is not None and shard_size < 1:
        raise UsageError(f"shard_size is the most bytes of data in one file, got {shard_size}.")
    for output in outputs:
        output_path(output)
    methods = [method_named(name) for name in (recipe.merge_method, *(each.merge_method for each in recipe.overrides))]
    known = {name for method in methods for name in method.parameters}
    if unknown := list(dict.fromkeys(name for parameters in recipe.levels for name in parameters if name not in known)):
        names = " and ".join(dict.fromkeys(method.name for method in methods))
        wrong = [f"{names} takes no parameter {name!r}.{nearest(name, known)}" for name in unknown]
        raise UsageError(listing("The recipe is wrong", wrong) if len(wrong) > 1 else wrong[0])


def _with_exclusions(recipe: Recipe) -> Recipe:
    """Return a recipe that merges the backbone only as one that excludes embeddings and heads."""
    if recipe.backbone != "only":
        return recipe
    vocabulary = Filter(f"regex:{tied_weights.VOCABULARY.pattern}")
    return replace(recipe, exclude=(*recipe.exclude, vocabulary))


def _not_fp8(jobs: Sequence[Job], source: Checkpoint, is_folder: bool) -> Iterator[str]:
    """Yield why an output can't be in FP8."""
    if not any(job.scales for job in jobs):
        yield f"out_dtype fp8: no linear layer of attention or MLP has sizes that are multiples of {block_fp8.EDGE}"
    if not is_folder or source.config is None:
        yield "out_dtype fp8: needs a folder with a config.json, which says what is quantised"


def opened_models(references: Sequence[str], already: Mapping[str, Checkpoint]) -> tuple[Checkpoint, ...]:
    """Open every model. Raises CheckpointError that names all that can't be opened."""
    opened: list[Checkpoint] = []
    wrong: list[CheckpointError] = []
    for reference in references:
        try:
            checkpoint = already.get(reference) or open_checkpoint(reference)
            checkpoint.check_names()
            opened.append(checkpoint)
        except CheckpointError as error:
            wrong.append(error)
    if len(wrong) > 1:
        raise CheckpointError(listing(f"{counted(len(wrong), 'model')} can't be opened", [str(each) for each in wrong]))
    if wrong:
        raise wrong[0]
    return tuple(opened)


def _under_one_naming(inputs: Sequence[Checkpoint], config_source: int) -> tuple[Checkpoint, ...]:
    """Return the inputs with the names of the one that gives the config."""
    source = unwrapped(inputs[config_source])
    return tuple(
        source if each is inputs[config_source] else (as_part if each.stands_for else shown_as)(each, source)
        for each in inputs
    )


def _jobs(
    making: Jobs, tensors: Sequence[Output], numbers: Sequence[Sequence[Numbers | None]]
) -> tuple[list[Job], dict[str, str], list[str]]:
    """Return the jobs of all tensors, why other tensors are left out, and what is wrong."""
    jobs: list[Job] = []
    spare: dict[str, str] = {}
    misfits: list[MismatchError] = []
    refused: list[tuple[str, str]] = []
    for tensor, made_with in zip(tensors, numbers, strict=True):
        try:
            jobs.append(making.job(tensor, made_with))
        except LeftOutError as why:
            spare[tensor.spot.name] = str(why)
        except MismatchError as mismatch:
            misfits.append(mismatch)
        except WrongNumbersError as wrong:
            refused.append((tensor.spot.name, str(wrong)))
    problems = _strangers(making, misfits)
    told = [(each.name, each.what) for each in misfits if not (problems and isinstance(each, MissingError))]
    return jobs, spare, problems + said_once(told + refused)


def _strangers(making: Jobs, misfits: Sequence[MismatchError]) -> list[str]:
    """Return a sentence for each model whose names don't fit those of the output, where tensors are missing for it."""
    if not any(isinstance(each, MissingError) for each in misfits):
        return []
    source = making.inputs[making.config_source]
    return [sentence for each in making.inputs if (sentence := names_differ(each, source))]


def _unmatched(recipe: Recipe, tensors: Sequence[Output]) -> list[str]:
    names = {tensor.spot for tensor in tensors}
    filters = dict.fromkeys(each for each in recipe.filters if not any(map(each.matches, names)))
    return [f"the pattern {each.expression!r} matches no tensor of {recipe.config_source}" for each in filters]


def _notes_on_jobs(
    jobs: Sequence[Job], spare: Mapping[str, str], alone: Mapping[tuple[str, str], int], source: Checkpoint
) -> list[str]:
    """Return what the user should know about tensors that are left out, or copied as one model alone has them."""
    heads = [f"{name} is left out: {why}." for name, why in spare.items() if tied_weights.is_head(name)]
    reasons = Counter(why for name, why in spare.items() if not tied_weights.is_head(name))
    heads += [f"{counted(number, 'tensor')} left out: {why}." for why, number in reasons.items()]
    heads += [
        f"{counted(number, 'tensor')} of {module} copied: only {reference} has that part."
        for (module, reference), number in alone.items()
    ]
    if any(job.merged_elements for job in jobs):
        return heads
    return [f"No tensor goes through the method: the output is a copy of {source.reference}.", *heads]


def _of_several(recipe: Recipe, source: Checkpoint, outputs: Sequence[str | OutputPath]) -> Iterator[str]:
    """Yield what can't be done with a folder of several models."""
    if not source.is_of_several:
        return
    folders = ", ".join(f"{part.folder}/" for part in source.parts if part.folder)
    if is_single_file(output_path(outputs[0])):
        yield f"{source.reference} is a folder of several models ({folders}), so the output is a folder: name one"
    if all(part.folder for part in source.parts) and (recipe.tokenizer is not None or recipe.chat_template is not None):
        yield f"chat_template and tokenizer are for a model of one folder, {source.reference} has several: {folders}"


def _tokenizer(recipe: Recipe, read: Sequence[Tokenizer | None], config_source: int) -> int:
    """Return which of the inputs gives the tokenizer: of a union the one that has the tokens of all."""
    if recipe.tokenizer is None:
        return config_source
    base = recipe.models.index(recipe.base_model or recipe.models[0])
    if recipe.tokenizer == UNION:
        return having_all_tokens(read, base)
    return base if recipe.tokenizer == BASE else recipe.models.index(recipe.tokenizer)


def _with_one_vocabulary(
    recipe: Recipe, inputs: tuple[Checkpoint, ...], read: Sequence[Tokenizer | None], tokenizer: int
) -> tuple[Aligned | None, list[str]]:
    """Return the inputs with their rows in the order of the tokenizer that is asked for, and what is wrong.

    None where nothing had to move.
    """
    is_union = recipe.tokenizer == UNION
    if recipe.tokenizer is None or (
        recipe.vocabulary == Vocabulary() and of_one_vocabulary(inputs, read, all_told=is_union)
    ):
        return None, []
    try:
        base = recipe.models.index(recipe.base_model) if recipe.base_model else None
        made = aligned(inputs, read, tokenizer, base, recipe.vocabulary, union=is_union)
    except VocabularyError as error:
        return None, [str(error)]
    on_more, wrong = examined(inputs[tokenizer], made.more) if made.more.entries else ([], [])
    return made._replace(notes=(*on_more, *made.notes)), wrong


def _origins(layers: int, recipe: Recipe, tensors: Sequence[Output], parts: Sequence[Sequence[int]]) -> list[Origin]:
    """Return where each layer of the output is from: of several sources the base, else the first."""
    origins: dict[int, Origin] = {}
    for tensor in tensors:
        if tensor.spot.layer is not None:
            base = recipe.slices[tensor.part].base
            source = base if base is not None and base in tensor.sources else tensor.sources[0]
            layer = dict(tensor.inputs)[source].layer
            assert layer is not None
            origins[tensor.spot.layer] = (parts[tensor.part][source], layer)
    return [origins[layer] for layer in range(layers)]


def _origins_of_modules(
    modules: Modules, recipe: Recipe, tensors: Sequence[Output], parts: Sequence[Sequence[int]]
) -> dict[int, list[Origin]]:
    """Return where each layer of each module is from whose layers were moved, by the module's number."""
    of_slices = [number for number, module in enumerate(recipe.modules) for _ in range(module.slices)]
    return {
        number: _origins(layers, recipe, [each for each in tensors if of_slices[each.part] == number], parts)
        for number, layers in modules.layers.items()
    }


def _told_outside(names: Sequence[str], source: Checkpoint) -> str:
    """Return what to say of tensors that are in no module."""
    first = sorted({".".join(name.split(".")[:2]) for name in names})
    listed = ", ".join(first[:4]) + (", …" if len(first) > 4 else "")
    return f"{counted(len(names), 'tensor')} in no module of the recipe ({listed}): copied from {source.reference}"


def _left_out(
    inputs: Sequence[Checkpoint], jobs: Sequence[Job], spare: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Return what no tensor of the output is made of, and why: (reference, name, reason)."""
    read: list[set[str]] = [set() for _ in inputs]
    for job in jobs:
        for model, spec in zip(job.models, job.inputs, strict=True):
            if model < len(inputs):  # not a file of statistics
                read[model].add(spec.name)
    reasons = {job.name: f"{job.why}: copied from {inputs[job.models[0]].reference}" for job in jobs if job.why}
    reasons |= spare
    for number, source in enumerate(inputs):
        for name in source.tensors:
            if name not in read[number]:
                yield source.reference, name, reasons.get(name, "no tensor of the output is made of it")
    for source in inputs:
        yield from ((source.reference, name, why) for name, why in source.left_out.items())
