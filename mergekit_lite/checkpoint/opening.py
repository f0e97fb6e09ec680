"""Open a checkpoint by its reference: find its files, read their headers, put their tensors together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint import formats, gguf_models, hub, quantised, references, vector_file, vector_tokens
from mergekit_lite.checkpoint.adapters.adapter import Adapter
from mergekit_lite.checkpoint.adapters.file import read_adapter
from mergekit_lite.checkpoint.checkpoint import Added, Checkpoint
from mergekit_lite.checkpoint.companion_patterns import has_tokenizer
from mergekit_lite.checkpoint.folded import Folded
from mergekit_lite.checkpoint.formats.header import Header
from mergekit_lite.checkpoint.identity import Identity
from mergekit_lite.checkpoint.parts import VALUE_HEAD, Part, in_folder, model_parts
from mergekit_lite.checkpoint.references import Addition
from mergekit_lite.checkpoint.stores.addresses import HUB, is_elsewhere
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.checkpoint.tokenizer_file import read_tokenizers
from mergekit_lite.checkpoint.training import State, check_whole, for_transformers, open_training
from mergekit_lite.checkpoint.vector_file import Vector
from mergekit_lite.errors import CheckpointError, listing
from mergekit_lite.input_files import read_json


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Open a checkpoint; only headers are read.

    Args:
        reference: a ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.gguf`` file, ``ckpt.pt:ema`` for what a torch
            file holds under a key, a folder with such files, the folder of a training checkpoint, ``FOLDER:ema`` for
            what that holds under a key, ``hf:FOLDER`` for it under transformers' names, ``part=BEGINNING:MODEL`` for
            one that stands for a part of a merge's base, ``rename=OLD>NEW:MODEL`` for other names, or a hub repository
            ``org/name`` or ``org/name@revision``; or one of these and what is added when weights are read, each after
            a ``+``: LoRA adapters and task vectors (see ``references``).

    Raises:
        CheckpointError: it doesn't exist, is damaged or hostile, or its format is refused; the message says what to do.
    """
    text = str(reference)
    if is_elsewhere(text) and "+" not in text:
        return _open_elsewhere(text)
    with _opening(text):
        path = Path(reference).expanduser()
        if path.is_dir() or path.is_file():
            return _open_path(text, path.resolve())
        if read_as := references.split_read_as(text):
            return _open_read_as(text, read_as)
        if "+" not in text and (names := references.split_names(text)):
            return _open_as_transformers(text, names)
        file, within = references.split_key(text)
        if within:
            return _open_path(text, file.resolve(), within=within)
    if text.startswith((references.VECTOR, references.REBASE)):
        raise CheckpointError(f"{text}: is a task vector, not a model. Name the model it is added to: BASE+{text}")
    if "+" in text:
        return _open_sum(text)
    if hub.is_streamed(text):
        return replace(_open_elsewhere(HUB + text), reference=text)
    folder = hub.fetch(text)
    return _open_path(text, folder, folder.name)


def _open_read_as(reference: str, read_as: references.ReadAs) -> Checkpoint:
    """Open a checkpoint that stands for a part of a merge's base, or whose names are read otherwise.

    Raises CheckpointError where no name begins as a renaming says, or two become the same.
    """
    model = open_checkpoint(read_as.rest)
    if read_as.renamed is None:
        return replace(model, reference=reference, stands_for=read_as.part.rstrip(".") + ".")
    old, new = read_as.renamed
    names = {name: new + name.removeprefix(old) if name.startswith(old) else name for name in model.tensors}
    if not any(name.startswith(old) for name in names):
        example = next(iter(names), "it has none")
        raise CheckpointError(f"{reference}: no tensor's name begins with {old!r}; the first is {example}")
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{reference}: {new!r} in the place of {old!r} makes one name of two.")
    tensors = {names[name]: replace(spec, name=names[name]) for name, spec in model.tensors.items()}
    return replace(model, reference=reference, tensors=tensors)


def _open_elsewhere(reference: str) -> Checkpoint:
    """Open a checkpoint by its URL: its weights are read by range."""
    keyed = references.KEYED.fullmatch(reference)
    path, revision = _stood_up(keyed["path"] if keyed else reference)
    return _open_path(reference, path, revision, keyed["key"] if keyed else "")


def _stood_up(reference: str) -> tuple[Path, str | None]:
    """Return what stands in for a URL here, and its commit on the hub; what that needs is imported for it alone."""
    from mergekit_lite.checkpoint.stores import mirror

    return mirror.stand_up(reference)


def _open_as_transformers(reference: str, names: references.Names) -> Checkpoint:
    """Open a checkpoint under the names that transformers loads, with the config from beside it or as named."""
    checkpoint = open_checkpoint(names.rest)
    home = for_transformers.config_folder(checkpoint.path, names.config)
    tensors, config = for_transformers.under_transformers_names(checkpoint.path, checkpoint.tensors, home)
    return replace(checkpoint, reference=reference, tensors=tensors, config=config, home=home, nest=())


def open_adapter(reference: str) -> Adapter:
    """Open a LoRA adapter by its folder, URL or hub repository; errors as in ``read_adapter``, or it doesn't exist."""
    if is_elsewhere(reference):
        return read_adapter(reference, *_stood_up(reference))
    with _opening(reference):
        path = Path(reference).expanduser()
        if path.exists():
            return read_adapter(reference, path.resolve())
    if hub.is_streamed(reference):
        return read_adapter(reference, *_stood_up(HUB + reference))
    folder = hub.fetch(reference, adapter=True)
    return read_adapter(reference, folder, folder.name)


@contextmanager
def _opening(reference: str) -> Iterator[None]:
    """Turn what the system raises while files are looked for into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{reference}: can't be opened: {getattr(error, 'strerror', None) or error}") from error


def _open_addition(addition: Addition) -> Adapter | Vector:
    with _opening(addition.path):
        if addition.is_vector or references.is_one_file(addition.path):
            return vector_file.open_vector(addition.path)
    return open_adapter(addition.path)


def _open_sum(reference: str) -> Checkpoint:
    """Open ``base+adapter``, ``base+vector:0.5+…``."""
    base_reference, additions = references.split_reference(reference)
    base = open_checkpoint(base_reference)
    folded, added = Folded(base.tensors, base.config, base.left_out), [*base.added]
    tokenizer = base.tokenizer_home
    identity: Identity | None = None
    for addition in additions:
        source = _open_addition(addition)
        if isinstance(source, Adapter) and base.is_of_several:
            raise CheckpointError(f"{base.of_several}+{addition}, as an adapter is for one model.")
        if isinstance(source, Vector) and not addition.rebase:
            identity = identity or base.identity()
            _check_base(source, identity)
        if isinstance(source, Vector):
            source, renamed = source.under_names_of(folded.tensors)
            moved = ""
            if vector_tokens.has_rows_of_tokens(source):
                [tokens] = read_tokenizers([replace(base, tokenizer_home=tokenizer)])
                if tokens is not None:
                    source, moved = vector_tokens.in_order_of(source, tokens, folded.tensors)
            told = tuple(f"{source.reference}: {note}" for note in (renamed, moved) if note)
            folded = folded._replace(notes=folded.notes + told)
        step = source.added_to(folded.tensors, folded.config, addition.scale)
        if step.has_tokenizer and has_tokenizer(source.path):
            tokenizer = source.path
            step = step._replace(notes=(*step.notes, "the tokenizer is the adapter's"))
        notes = tuple(f"{source.reference}: {note}" for note in step.notes)
        folded = step._replace(left_out={**folded.left_out, **step.left_out}, notes=folded.notes + notes)
        if isinstance(source, Adapter) and source.path.is_dir():
            others = sorted(path.name for path in source.path.iterdir() if folders.may_be_weights(path.name))
            beside = [f"{name} of {addition.path}" for name in others if source.file.path.name != name]
            reason = "lies beside the adapter, and is no part of it"
            folded = folded._replace(left_out={**folded.left_out, **dict.fromkeys(beside, reason)})
        added.append(Added(source, addition))
    return replace(
        base,
        reference=reference,
        files=(*base.files, *(each.source.file for each in added)),
        tensors=folded.tensors,
        config=folded.config,
        left_out=folded.left_out,
        added=tuple(added),
        notes=base.notes + folded.notes,
        tokenizer_home=tokenizer,
    )


def _check_base(vector: Vector, base: Identity) -> None:
    if not vector.base.is_of(base):
        differ = "weights" if vector.base.header == base.header else "tensors"
        raise CheckpointError(
            f"{vector.reference}: was made from {vector.base.reference}, whose {differ} are not those of "
            f"{base.reference}. Name that base; or, if the two models are close, add it all the same: "
            f"rebase:{vector.reference} in a reference or recipe, --rebase on the command line."
        )


def _open_path(reference: str, path: Path, revision: str | None = None, within: str = "") -> Checkpoint:
    """Read the headers of a folder's weight files, or of a single file, and put their tensors together."""
    has_config = (path / "config.json").exists()
    if (path / folders.ADAPTER_CONFIG).exists() and (not has_config or folders.is_adapter_alone(path)):
        raise CheckpointError(
            f"{path}: is a LoRA adapter, not a model. Name the model that it is for before it: BASE+{reference}"
        )
    if path.is_dir() and (state := open_training(path, within)) is not None:
        return _open_state(reference, path, state)
    if within and path.is_dir():
        raise CheckpointError(f"{reference}: is no training checkpoint, and other folders have no keys. Name {path}.")
    parts = model_parts(path) if path.is_dir() else [Part()]
    opened = [_open_part(reference, path, revision, within, part) for part in parts]
    return opened[0] if len(opened) == 1 and not parts[0].folder else _put_together(path, opened)


def _open_part(reference: str, path: Path, revision: str | None, within: str, part: Part) -> Checkpoint:
    """Open one part of a model by itself, its tensors under their own names."""
    index: Mapping[str, str] | None = None
    paths, config = folders.parts_of(path), part.config
    if part.stem == VALUE_HEAD:
        paths = [folders.value_head_file(path, part.folder)]
    elif path.is_dir():
        paths, index = folders.weight_files(path, part.folder)
    headers = [_model_header(reference, file, within) for file in paths]
    files = tuple(replace(header.file, folder=part.folder) for header in headers)
    left_out = {name: "not a tensor of the model's state" for header in headers for name in header.left_out}
    tensors, nest, parts = _joined(path, headers, index), headers[-1].nest, (replace(part, files=files),)
    if of_gguf := [header.values for header in headers if header.values is not None]:
        model = gguf_models.as_transformers(path, tensors, of_gguf)
        opened = Checkpoint(reference, path, files, model.tensors, config, (), model.left_out, revision, parts=parts)
        opened = replace(opened, in_shards=False)
        return opened if config else replace(opened, config=model.config, config_made=model.config_made)
    shown, hidden = quantised.dequantised(path, tensors, config)
    return Checkpoint(reference, path, files, shown, config, nest, left_out | hidden, revision, parts=parts)


def _put_together(path: Path, opened: Sequence[Checkpoint]) -> Checkpoint:
    """Return the parts of a model as one, its tensors under names that begin with their folders."""
    tensors: dict[str, TensorSpec] = {}
    left_out: dict[str, str] = {}
    twice: list[str] = []
    for each in opened:
        folder = each.parts[0].folder
        named = {in_folder(folder, name): spec for name, spec in each.tensors.items()}
        twice += [
            f"{name} (in {tensors[name].file.name} and {named[name].file.name})" for name in named if name in tensors
        ]
        tensors |= {name: replace(spec, name=name) for name, spec in named.items()}
        left_out |= {in_folder(folder, name): why for name, why in each.left_out.items()}
    if twice:
        raise CheckpointError(listing(f"{path}: these tensors are stored twice; it is not clear which is meant", twice))
    own = next((each.config for each in opened if not each.parts[0].folder), None)
    files = tuple(file for each in opened for file in each.files)
    parts = tuple(each.parts[0] for each in opened)
    return replace(opened[0], files=files, tensors=tensors, config=own, left_out=left_out, parts=parts)


def _open_state(reference: str, path: Path, state: State) -> Checkpoint:
    """Return a training checkpoint, with the config that lies in its folder."""
    config = read_json(folders.inside(path, "config.json")) if (path / "config.json").exists() else None
    return Checkpoint(
        reference,
        path,
        state.files,
        state.tensors,
        config,
        state.nest,
        state.left_out,
        notes=tuple(f"{reference}: {note}" for note in state.notes),
        in_shards=False,
    )


def _model_header(reference: str, file: Path, within: str) -> Header:
    header = formats.read_header(file, within)
    check_whole(header)
    if vector_file.KEY in header.metadata:
        raise CheckpointError(f"{file}: is a task vector, not a model. Name the model it is added to: BASE+{reference}")
    return header


def _joined(path: Path, headers: Sequence[Header], index: Mapping[str, str] | None) -> dict[str, TensorSpec]:
    """Return the tensors of all files, once each is in one file alone, and in the one that the index says."""
    tensors: dict[str, TensorSpec] = {}
    twice: list[str] = []
    for header in headers:
        again = [name for name in header.tensors if name in tensors]
        twice += [f"{name} (in {tensors[name].file.name} and {header.file.path.name})" for name in again]
        tensors |= header.tensors
    if twice:
        raise CheckpointError(listing(f"{path}: these tensors are stored twice; it is not clear which is meant", twice))
    if index is not None:
        _check_index(path, index, tensors)
    return tensors


def _check_index(folder: Path, index: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> None:
    wrong = [
        f"{name}: the index says {file}, "
        + (f"it is in {tensors[name].file.name}" if name in tensors else "no shard has it")
        for name, file in index.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    unnamed = [spec for name, spec in tensors.items() if name not in index]
    wrong += [f"{spec.name}: is in {spec.file.name}, the index lacks it" for spec in unnamed]
    if wrong:
        raise CheckpointError(listing(f"{folder}: index and shards don't agree; download the folder again", wrong))
