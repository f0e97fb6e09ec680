"""Statistics for RegMean++: the Gram matrices of each layer are of text that came through the merged layers before it.

Paper: Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
TMLR 2026, arXiv 2508.03121.

Embeddings are merged first. Then, from layer to layer: each model's whole layer, its norms too, reads what the merged
layers before it make of that model's prompts, which gives its Gram matrices; and the layer is merged with them. A head
reads what the merged model makes. The files that are written are those that the recipe names, which the merge by
``regmean_plus`` then reads.

One model is in memory, whose layers are merged up to some depth. Nothing is kept of the text in between: each layer
has the text read anew up to it, by the model's own forward pass, so that all that a model hands from layer to layer is
right. So n layers take the work of (n + 1) / 2 forward passes of each model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from mergekit_lite.answers.loading import context_of
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.statistics_file import DTYPE, Prefix
from mergekit_lite.engine.devices import chosen_device
from mergekit_lite.errors import UsageError, listing
from mergekit_lite.gathering.examples import Examples, examples_of, prompts_in
from mergekit_lite.gathering.gathering import INSTEAD, Gathered, metadata, notes_on
from mergekit_lite.gathering.options import Counted, Reading, StatisticsOptions
from mergekit_lite.gathering.outputs import checked_output
from mergekit_lite.layout import OutputTensor
from mergekit_lite.methods import METHODS
from mergekit_lite.options import named_options
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.planning.statistics import digest_of_merge
from mergekit_lite.recipe import Recipe, parse, text_of
from mergekit_lite.recipe.layers import place

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergekit_lite.answers.prompts import LoadedPrompts
    from mergekit_lite.checkpoint import Checkpoint
    from mergekit_lite.gathering.layers import Inputs, Layers
    from mergekit_lite.gathering.working_file import WorkingFile
    from mergekit_lite.resident.model import Built
    from mergekit_lite.resident.weights import Weights

PLUS = "regmean_plus"
Where = tuple[str, int] | None  # a stack and a layer in it; None for what is in no layer


@dataclass(frozen=True)
class _Part:
    """What is merged at once: a layer, or a linear layer outside of them."""

    inputs: tuple[Inputs, ...]
    own: frozenset[str]  # the tensors that are each model's own while it reads
    merged: frozenset[str]  # the tensors that are merged then


@dataclass
class _Model:
    """One of the models, what it reads, and the file that is written."""

    source: Checkpoint
    plan: Plan  # of the model as it is
    loaded: LoadedPrompts
    examples: Examples
    output: Path
    passes: int = 0


@named_options
def gather_statistics_plus(
    recipe: str | Path,
    prompts: Mapping[str, Sequence[str | Path]],
    **options: Unpack[StatisticsOptions],
) -> tuple[Gathered, ...]:
    """Write the Gram matrices that ``merge_method: regmean_plus`` reads: of each layer behind the merged ones.

    A killed run goes on with the layers that it had finished.

    Args:
        recipe: a file of ``merge_method: regmean_plus``; each model's ``statistics`` names the file that is written.
        prompts: for each model, by its name in the recipe, JSON, JSON Lines or Parquet files of them.
        **options: see ``StatisticsOptions``.

    Raises:
        UsageError: the recipe is wrong or moves layers, a file exists, prompts are missing, or a model doesn't fit into
            memory, has no linear layers, or runs some of them more than once.
        CheckpointError: a model can't be opened.
        PlanError: the models don't fit together.
        RunError: something can't be read or written, or isn't finite.
    """
    how = Reading(**options)
    asked = parse(text_of(Path(recipe)), str(recipe))
    outputs = _outputs(asked, prompts, how.force)
    device = chosen_device(how.device)
    opened = {reference: open_checkpoint(reference) for reference in asked.models}
    from mergekit_lite.gathering.layers import linear_layers
    from mergekit_lite.gathering.working_file import WorkingFile, publish
    from mergekit_lite.resident.model import build
    from mergekit_lite.resident.weights import Weights
    from mergekit_lite.resident.whole import check_memory, plan_of_whole

    plan = plan_of_whole(opened[asked.config_source], device)
    check_memory(plan, device, INSTEAD)
    built = build(plan, device)
    models = [
        _model(opened[reference], prompts[reference], output, built, device, how)
        for reference, output in outputs.items()
    ]
    weights = Weights(built, device, how.threads)
    weights.set(models[0].plan)
    layers = linear_layers(built, models[0].examples.rows)
    parts = _parts(layers, built, asked)
    recipe_of_prefix = replace(asked, dtype=None, out_dtype=plan.out_dtype)
    together = digest_of_merge(asked, opened)
    run = [together, *sorted((model.source.identity().sample, model.examples.digest) for model in models)]
    prefix = Prefix(together, xxhash.xxh3_128_hexdigest(repr(run).encode()))
    tensors = [OutputTensor(read.name, DTYPE, (read.size, read.size)) for read in layers.inputs]
    with ExitStack() as stack:
        files = [
            stack.enter_context(
                WorkingFile(
                    model.output,
                    tensors,
                    metadata("gram", built, model.source, model.examples, device, layers.grams, prefix),
                    force=how.force,
                )
            )
            for model in models
        ]
        partial = {reference: file.partial for reference, file in zip(outputs, files, strict=True)}

        def merge(names: Iterable[str]) -> None:  # planned anew: the files with matrices have changed
            weights.set(_merged(recipe_of_prefix, partial, opened), frozenset(names))

        _go_through(parts, models, files, weights, layers, how, merge)
        publish(files)
    return tuple(
        Gathered(
            path=model.output,
            kind="gram",
            matrices=len(tensors),
            nbytes=sum(tensor.nbytes for tensor in tensors),
            examples=len(model.examples.rows),
            tokens=model.examples.tokens,
            cut=model.examples.cut,
            passes=model.passes,
            notes=notes_on(model.loaded, model.examples, context_of(built.model)),
        )
        for model in models
    )


def _outputs(recipe: Recipe, prompts: Mapping[str, object], force: bool) -> dict[str, Path]:
    """Return the file of each model that is merged. Raises UsageError where the recipe or the prompts don't do."""
    readers = {name for name in _methods(recipe) if METHODS[name].statistics}
    if readers != {PLUS}:
        other = " and ".join(sorted(readers - {PLUS})) or recipe.merge_method
        raise UsageError(f"--plus gathers for a recipe of merge_method: {PLUS}, and this is of {other}.")
    if len(recipe.slices) != 1 or not recipe.slices[0].is_whole or recipe.modules or recipe.tokenizer is not None:
        raise UsageError("RegMean++ merges whole models under 'models', of one tokenizer: no slices, modules, unions.")
    named = {source.model: source.statistics for source in recipe.slices[0].sources}
    problems = [f"{model}: the recipe merges no such model" for model in prompts if model not in named]
    problems += [f"{model}: has no prompts: --prompts '{model}=FILE'" for model in named if not prompts.get(model)]
    paths = {model: Path(file).expanduser() for model, file in named.items() if file is not None}
    if len({path.resolve() for path in paths.values()}) < len(paths):
        problems.append("two models name the same file of statistics")
    if problems:
        raise UsageError(listing("Statistics for RegMean++ can't be gathered", problems))
    return {model: checked_output(path, force) for model, path in paths.items()}


def _methods(recipe: Recipe) -> tuple[str, ...]:
    return (recipe.merge_method, *(override.merge_method for override in recipe.overrides))


def _model(
    source: Checkpoint,
    prompts: Sequence[str | Path],
    output: Path,
    built: Built,
    device: str,
    how: Reading,
) -> _Model:
    """Return a model with its prompts, as its own tokenizer gives them. Raises UsageError where it can't be set."""
    from mergekit_lite.resident.model import tokenizer_of
    from mergekit_lite.resident.whole import check_tokens, plan_of_whole

    loaded = prompts_in(map(Path, prompts), how.response)
    if loaded.problems and not loaded.prompts:
        raise UsageError(listing(f"{source.reference}: no prompt can be read", loaded.problems))
    plan = plan_of_whole(source, device)
    shapes = {job.name: job.shape for job in plan.jobs}
    if odd := [name for name, values in built.places.items() if shapes.get(name) != tuple(values.shape)]:
        raise UsageError(
            listing(f"{source.reference}: RegMean++ needs tensors of the same names and shapes; it lacks", odd, shown=3)
        )
    read = loaded.prompts[: how.limit]
    examples = examples_of(read, tokenizer_of(plan), context_of(built.model), needs_response=False)
    numbers = [[*row.prompt, *row.response] for row in examples.rows]
    check_tokens(numbers, len(built.model.get_input_embeddings().weight), source.reference)
    return _Model(source, plan, loaded, examples, output)


def _parts(layers: Layers, built: Built, recipe: Recipe) -> list[_Part]:
    """Return what is merged one after another, behind a first part without inputs: all that no text is summed up for.

    Raises:
        UsageError: there are no linear layers, or some are run more than once or not in the order of layers.
    """
    if not layers.inputs:
        raise UsageError(f"{recipe.models[0]}: its model has no linear layers of its own. regmean would only average.")
    if not layers.runs_once:
        raise UsageError(f"{recipe.models[0]}: runs layers more than once: RegMean++ has no order to merge them in.")
    weights: dict[str, set[str]] = {}
    for weight, gram in layers.grams.items():
        weights.setdefault(gram.name, set()).add(weight)
    in_order = [(where, tuple(reads)) for where, reads in groupby(layers.inputs, lambda read: _where(read.name))]
    seen = [where for where, _ in in_order if where is not None]
    if len(set(seen)) < len(seen):
        raise UsageError(f"{recipe.models[0]}: its layers don't run one after another: RegMean++ can't merge them so.")
    parts = []
    for where, reads in in_order:
        if where is None:  # what it reads hangs on no tensor of its own
            parts += [_Part((read,), frozenset(), frozenset(weights[read.name])) for read in reads]
            continue
        own = frozenset(name for name in built.places if _where(name) == where)
        parts.append(_Part(reads, own, own))
    rest = built.places.keys() - {name for part in parts for name in part.merged}
    return [_Part((), frozenset(), frozenset(rest)), *parts]


def _where(name: str) -> Where:
    at = place(name)
    return at and (at.stack, at.layer)


def _merged(recipe: Recipe, files: Mapping[str, Path], opened: Mapping[str, Checkpoint]) -> Plan:
    """Return the plan of the merge with the matrices that are in the files so far."""
    [part] = recipe.slices
    sources = tuple(replace(source, statistics=str(files[source.model])) for source in part.sources)
    return make_plan(replace(recipe, slices=(replace(part, sources=sources),)), [Path("prefix")], opened=opened)


def _go_through(
    parts: Sequence[_Part],
    models: Sequence[_Model],
    files: Sequence[WorkingFile],
    weights: Weights,
    layers: Layers,
    how: Reading,
    merge: Callable[[Iterable[str]], None],
) -> None:
    """Gather and merge part by part; what is in the files is not gathered again."""
    from mergekit_lite.gathering.passes import GRAM, gram_pass, grouped

    most = how.most(weights.device)
    work: list[list[list[list[Inputs]]]] = [  # of each part and model: the inputs of each pass
        [
            grouped((read for read in part.inputs if read.name in file.missing), lambda read: GRAM * read.size**2, most)
            for file in files
        ]
        for part in parts
    ]
    in_all = sum(
        len(passes) * model.examples.tokens for part in work for model, passes in zip(models, part, strict=True)
    )
    advance = Counted(how, in_all)
    for part, of_models in zip(parts, work, strict=True):
        for model, file, passes in zip(models, files, of_models, strict=True):
            if passes and part.own:
                weights.set(model.plan, part.own)
            for group in passes:
                made = gram_pass(weights.built, layers, group, model.examples.rows, how.batch_size, advance, file)
                for name, values in made:
                    file.write(name, values)
                model.passes += 1
        merge(part.merged)
