"""Statistics of a model on prompts: what RegMean and Fisher merging need to know of it, in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.answers.loading import context_of
from mergekit_lite.answers.prompts import LoadedPrompts
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.statistics_file import DTYPE, Gram, Kind, Prefix, metadata_of
from mergekit_lite.engine.devices import chosen_device, kind_of
from mergekit_lite.errors import UsageError, counted, listing
from mergekit_lite.gathering.examples import Examples, examples_of, prompts_in
from mergekit_lite.gathering.options import Counted, Reading, StatisticsOptions
from mergekit_lite.gathering.outputs import checked_output
from mergekit_lite.layout import OutputTensor
from mergekit_lite.options import named_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergekit_lite.checkpoint import Checkpoint
    from mergekit_lite.gathering.passes import Progress, Results
    from mergekit_lite.gathering.working_file import WorkingFile
    from mergekit_lite.resident.model import Built

INSTEAD = "a smaller model: statistics need it in memory"


@dataclass(frozen=True)
class Gathered:
    """A file of statistics.

    Attributes:
        path: the file.
        kind: ``gram`` or ``fisher``.
        matrices: how many tensors it holds.
        nbytes: their bytes.
        examples: how many were read.
        tokens: how many tokens they have.
        cut: how many examples were cut at the longest text that the model takes.
        passes: how often the examples were read; 0 where an earlier run had done all of it.
        notes: what the user should know.
    """

    path: Path
    kind: Kind
    matrices: int
    nbytes: int
    examples: int
    tokens: int
    cut: int
    passes: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "path": str(self.path), "notes": list(self.notes)}


@dataclass(frozen=True)
class _Work:
    """What is gathered: the tensors of the file, its metadata, and what makes some of them in one pass."""

    tensors: Sequence[OutputTensor]
    metadata: dict[str, str]
    passes: Callable[
        [frozenset[str]], list[Callable[[Progress, WorkingFile], Results]]
    ]  # of the names that are missing


@named_options
def gather_statistics(
    model: str | Path,
    prompts: Sequence[str | Path] | LoadedPrompts,
    output: str | Path,
    *,
    fisher: bool = False,
    **options: Unpack[StatisticsOptions],
) -> Gathered:
    """Let a model read prompts, and write statistics of that for ``merge_method: regmean`` or ``fisher``.

    Gram matrices XᵀX / tokens of the inputs X of every linear layer that text goes through, padding not counted; layers
    that read the same share one. Or the diagonal of the Fisher information: the mean over examples of the squared
    gradient of the log-probability of the response. A killed run goes on where it was some minutes before, to the same
    bytes.

    Args:
        model: a causal language model that transformers knows, with its tokenizer.
        prompts: JSON, JSON Lines or Parquet files of them, or prompts that were read.
        output: a ``.safetensors`` file.
        fisher: gather Fisher information, for which each prompt needs a response.
        **options: see ``StatisticsOptions``.

    Raises:
        UsageError: the output exists or can't be named, prompts or responses are missing, or the model doesn't fit into
            memory, has no linear layers, or is none that transformers knows.
        CheckpointError: the model can't be opened.
        RunError: something can't be read or written, or isn't finite.
    """
    how = Reading(**options)
    path = checked_output(Path(output).expanduser(), how.force)
    loaded = prompts if isinstance(prompts, LoadedPrompts) else prompts_in(map(Path, prompts), how.response)
    device = chosen_device(how.device)
    source = open_checkpoint(str(model))
    from mergekit_lite.gathering.working_file import WorkingFile, publish  # with torch, as what follows
    from mergekit_lite.resident.model import build, tokenizer_of
    from mergekit_lite.resident.weights import Weights
    from mergekit_lite.resident.whole import check_memory, check_tokens, plan_of_whole

    plan = plan_of_whole(source, device)
    check_memory(plan, device, INSTEAD)
    tokenizer = tokenizer_of(plan)
    if loaded.problems and not loaded.prompts:
        raise UsageError(listing("No prompt can be read", loaded.problems))
    built = build(plan, device)
    examples = examples_of(loaded.prompts[: how.limit], tokenizer, context_of(built.model), needs_response=fisher)
    numbers = [[*row.prompt, *row.response] for row in examples.rows]
    check_tokens(numbers, len(built.model.get_input_embeddings().weight), source.reference)
    Weights(built, device, how.threads).set(plan)
    work = (_fisher if fisher else _grams)(built, source, examples, device, how)
    with WorkingFile(path, work.tensors, work.metadata, force=how.force) as file:
        passes = work.passes(file.missing)
        advance = Counted(how, examples.tokens * len(passes))
        for one in passes:
            for name, values in one(advance, file):
                file.write(name, values)
        publish([file])
    return Gathered(
        path=path,
        kind="fisher" if fisher else "gram",
        matrices=len(work.tensors),
        nbytes=sum(tensor.nbytes for tensor in work.tensors),
        examples=len(examples.rows),
        tokens=examples.tokens,
        cut=examples.cut,
        passes=len(passes),
        notes=notes_on(loaded, examples, context_of(built.model)),
    )


def notes_on(loaded: LoadedPrompts, examples: Examples, context: int | None) -> tuple[str, ...]:
    """Return what the user should know of prompts that were read, up to the longest text that the model takes."""
    notes = [f"left out: {problem}" for problem in loaded.problems]
    if loaded.repeated:
        notes.append(f"{counted(loaded.repeated, 'prompt')} left out: an earlier one is the same conversation")
    if examples.cut:
        notes.append(f"{counted(examples.cut, 'example')} cut at {context:,} tokens, what the model takes")
    return (*notes, *examples.notes)


def _grams(built: Built, source: Checkpoint, examples: Examples, device: str, how: Reading) -> _Work:
    from mergekit_lite.gathering.layers import linear_layers
    from mergekit_lite.gathering.passes import GRAM, gram_pass, grouped

    layers = linear_layers(built, examples.rows)
    if not layers.inputs:
        raise UsageError(f"{source.reference}: its model has no linear layers of its own. regmean would only average.")

    def passes(missing: frozenset[str]) -> list[Callable[[Progress, WorkingFile], Results]]:
        units = [read for read in layers.inputs if read.name in missing]
        groups = grouped(units, lambda read: GRAM * read.size**2, how.most(device))
        return [
            lambda progress, file, group=group: gram_pass(  # type: ignore[misc]
                built, layers, group, examples.rows, how.batch_size, progress, file
            )
            for group in groups
        ]

    tensors = [OutputTensor(read.name, DTYPE, (read.size, read.size)) for read in layers.inputs]
    return _Work(tensors, metadata("gram", built, source, examples, device, layers.grams), passes)


def _fisher(built: Built, source: Checkpoint, examples: Examples, device: str, how: Reading) -> _Work:
    from mergekit_lite.answers.logprobs import check_head
    from mergekit_lite.gathering.passes import fisher_pass, grouped, parameters_of

    check_head(built.model)
    parameters = parameters_of(built)

    def passes(missing: frozenset[str]) -> list[Callable[[Progress, WorkingFile], Results]]:
        units = [each for each in parameters if missing.intersection(each.names)]
        groups = grouped(units, lambda each: each.nbytes, how.most(device))
        return [
            lambda progress, file, group=group: fisher_pass(  # type: ignore[misc]
                built, group, examples.rows, progress, file
            )
            for group in groups
        ]

    names = [name for each in parameters for name in each.names]
    tensors = [OutputTensor(name, DTYPE, tuple(built.places[name].shape)) for name in names]
    return _Work(tensors, metadata("fisher", built, source, examples, device, {}), passes)


def metadata(
    kind: Kind,
    built: Built,
    source: Checkpoint,
    examples: Examples,
    device: str,
    grams: Mapping[str, Gram],
    prefix: Prefix | None = None,
) -> dict[str, str]:
    """Return the metadata of what a model makes of examples; ``prefix`` tells of merged layers that were before it."""
    computed = f"{str(built.model.dtype).removeprefix('torch.')} on {kind_of(device)}"
    counts = (examples.tokens, len(examples.rows), examples.digest, computed)
    return metadata_of(kind, source.identity(), *counts, grams, prefix)
