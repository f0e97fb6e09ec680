"""Open a checkpoint by its reference: find its files and read their headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lite.checkpoint import adapter as adapters
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint import formats, gguf_models, hub, quantised, references, vector_file
from mergekit_lite.checkpoint.adapter import Adapter
from mergekit_lite.checkpoint.formats.header import Header, WeightFile
from mergekit_lite.checkpoint.identity import Identity, identify
from mergekit_lite.checkpoint.references import Addition
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.checkpoint.vector_file import Vector
from mergekit_lite.errors import CheckpointError, listing
from mergekit_lite.input_files import read_json
from mergekit_lite.plain_text import NOT_PLAIN, is_plain_line


class Added(NamedTuple):
    """An adapter or a task vector that is added to a base, and the part of the reference that asked for it."""

    source: Adapter | Vector
    addition: Addition


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors on some storage, known from headers alone.

    Attributes:
        reference: the text it was opened by.
        path: the folder, or the single file.
        files: the identities of its weight files.
        tensors: every tensor by name, in the order of their bytes in the files.
        config: the folder's ``config.json``, if any.
        nest: the keys a torch file keeps its tensors under.
        left_out: for all that the files hold but these tensors, why it is left out.
        revision: the commit a hub repository was fetched at.
        added: the adapters and task vectors that are added when weights are read.
        config_made: how ``config`` was made of a GGUF's header, or why it wasn't, where there is no ``config.json``.
    """

    reference: str
    path: Path
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any] | None = None
    nest: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    added: tuple[Added, ...] = ()
    config_made: str = ""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every folder or file that is read."""
        return (self.path, *(each.source.path for each in self.added))

    @property
    def base_reference(self) -> str:
        """The reference without what is added."""
        return references.split_reference(self.reference)[0] if self.added else self.reference

    def identity(self) -> Identity:
        """Return what a task vector recognises it by; some kilobytes of each tensor are read."""
        return identify(self.reference, self.revision, self.tensors)

    @property
    def folder(self) -> Path | None:
        """The folder with config and tokenizer, or None for a bare file."""
        return self.path if self.path.is_dir() else None

    def check_names(self) -> None:
        """Raise CheckpointError where the reference, or the name of a weight file, can't be put into a manifest."""
        for name in (self.reference, *(file.path.name for file in self.files)):
            if not is_plain_line(name):
                raise CheckpointError(f"{name}: {NOT_PLAIN}. Rename it, or link to it by another name.")

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a weight file is no longer the one that was opened."""
        for file in self.files:
            file.check_unchanged()


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Open a checkpoint; only headers are read.

    Args:
        reference: a ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.gguf`` file, ``ckpt.pt:ema`` for what a torch
            file holds under a key, a folder with such files, or a hub repository ``org/name`` or ``org/name@revision``;
            or one of these and what is added when weights are read, each after a ``+``: LoRA adapters and task vectors
            (see ``references``).

    Raises:
        CheckpointError: it doesn't exist, is damaged or hostile, or its format is refused; the message says what to do.
    """
    text = str(reference)
    with _opening(text):
        path = Path(reference).expanduser()
        if path.is_dir() or path.is_file():
            return _open_path(text, path.resolve())
        file, within = references.split_key(text)
        if within:
            return _open_path(text, file.resolve(), within=within)
    if text.startswith((references.VECTOR, references.REBASE)):
        raise CheckpointError(f"{text}: is a task vector, not a model. Name the model it is added to: BASE+{text}")
    if "+" in text:
        return _open_sum(text)
    folder = hub.fetch(text)
    return _open_path(text, folder, folder.name)


def open_adapter(reference: str) -> Adapter:
    """Open a LoRA adapter by its folder or hub repository; errors as in ``read_adapter``, or it doesn't exist."""
    with _opening(reference):
        path = Path(reference).expanduser()
        if path.exists():
            return adapters.read_adapter(reference, path.resolve())
    folder = hub.fetch(reference, adapter=True)
    return adapters.read_adapter(reference, folder, folder.name)


@contextmanager
def _opening(reference: str) -> Iterator[None]:
    """Turn what the system raises while files are looked for into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{reference}: can't be opened: {getattr(error, 'strerror', None) or error}") from error


def _open_addition(addition: Addition) -> Adapter | Vector:
    path = Path(addition.path).expanduser()
    with _opening(addition.path):
        if path.is_file() or addition.is_vector:
            return vector_file.read_vector(addition.path, path.resolve())
    return open_adapter(addition.path)


def _open_sum(reference: str) -> Checkpoint:
    """Open ``base+adapter``, ``base+vector:0.5+…``."""
    base_reference, additions = references.split_reference(reference)
    base = open_checkpoint(base_reference)
    tensors, left_out, added = dict(base.tensors), dict(base.left_out), [*base.added]
    identity: Identity | None = None
    for addition in additions:
        source = _open_addition(addition)
        if isinstance(source, Vector) and not addition.rebase:
            identity = identity or base.identity()
            _check_base(source, identity)
        tensors, replaced = source.added_to(tensors, base.config, addition.scale)
        left_out |= replaced
        added.append(Added(source, addition))
    return replace(
        base,
        reference=reference,
        files=(*base.files, *(each.source.file for each in added)),
        tensors=tensors,
        left_out=left_out,
        added=tuple(added),
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
    paths, index = folders.weight_files(path) if path.is_dir() else (folders.parts_of(path), None)
    config = read_json(folders.inside(path, "config.json")) if has_config else None
    headers = [_model_header(reference, file, within) for file in paths]
    files = tuple(header.file for header in headers)
    left_out = {name: "not a tensor of the model's state" for header in headers for name in header.left_out}
    tensors = _joined(path, headers, index)
    if of_gguf := [header.values for header in headers if header.values is not None]:
        model = gguf_models.as_transformers(path, tensors, of_gguf)
        opened = Checkpoint(reference, path, files, model.tensors, config, (), model.left_out, revision)
        return opened if config else replace(opened, config=model.config, config_made=model.config_made)
    shown, hidden = quantised.dequantised(path, tensors, config)
    return Checkpoint(reference, path, files, shown, config, headers[-1].nest, left_out | hidden, revision)


def _model_header(reference: str, file: Path, within: str) -> Header:
    header = formats.read_header(file, within)
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
