"""Open a checkpoint by its reference: find its files, read their headers, say what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lite.checkpoint import adapter as adapters
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint import quantised, references, safetensors_file, torch_file, vector_file
from mergekit_lite.checkpoint.adapter import Adapter
from mergekit_lite.checkpoint.identity import Identity, identify
from mergekit_lite.checkpoint.references import Addend
from mergekit_lite.checkpoint.tensor import TensorSpec, WeightFile
from mergekit_lite.checkpoint.vector_file import Vector
from mergekit_lite.errors import CheckpointError, listing


class Added(NamedTuple):
    """An adapter or a task vector that is added to a base, and how it was named, with its scale."""

    source: Adapter | Vector
    addend: Addend


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
        left_out: what the files hold beside tensors that can be merged, and why it is left out.
        revision: the commit a hub repository was fetched at.
        added: the adapters and task vectors that are added when weights are read.
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

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every folder or file that is read."""
        return (self.path, *(each.source.path for each in self.added))

    @property
    def base_reference(self) -> str:
        """The reference less what is added."""
        return references.parted(self.reference)[0] if self.added else self.reference

    def identity(self) -> Identity:
        """How a task vector knows it again; some kilobytes of each tensor are read."""
        return identify(self.reference, self.revision, self.tensors)

    @property
    def folder(self) -> Path | None:
        """The folder with config and tokenizer, or None for a bare file."""
        return self.path if self.path.is_dir() else None

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a weight file is no longer the one that was opened."""
        for file in self.files:
            file.check_unchanged()


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Open a checkpoint; only headers are read.

    Args:
        reference: a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file, a folder with such files, or a hub repository
            ``org/name`` or ``org/name@revision``; or one of these and what is added when weights are read, each after a
            ``+``: LoRA adapters and task vectors (see ``addends``).

    Raises:
        CheckpointError: it doesn't exist, is damaged or hostile, or its format is refused; the message says what to do.
    """
    text = str(reference)
    with _opening(text):
        path = Path(reference).expanduser()
        if path.is_dir():
            return _open_folder(text, path.resolve())
        if path.is_file():
            return _open_file(text, path.resolve())
    if references.names_vector(text):
        raise CheckpointError(f"{text}: is a task vector, not a model. Name the model it is added to: BASE+{text}")
    if "+" in text:
        return _with_added(text)
    from mergekit_lite.checkpoint import hub

    fetched = hub.fetch(text)
    return _open_folder(text, fetched.folder, fetched.revision)


def open_adapter(reference: str) -> Adapter:
    """Open a LoRA adapter, a folder or a hub repository; only its config and headers are read.

    Raises:
        CheckpointError: it doesn't exist, is damaged or hostile, or of a kind that is refused.
    """
    with _opening(reference):
        path = Path(reference).expanduser()
        if path.exists():
            return adapters.read_adapter(reference, path.resolve())
    from mergekit_lite.checkpoint import hub

    fetched = hub.fetch(reference, adapter=True)
    return adapters.read_adapter(reference, fetched.folder, fetched.revision)


@contextmanager
def _opening(reference: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{reference}: can't be opened: {getattr(error, 'strerror', None) or error}") from error


def open_addend(addend: Addend) -> Adapter | Vector:
    """Open a task vector or an adapter. Raises CheckpointError as ``read_vector`` and ``open_adapter`` do."""
    path = Path(addend.path).expanduser()
    with _opening(addend.path):
        if path.is_file() or addend.is_vector:
            return vector_file.read_vector(addend.path, path.resolve())
    return open_adapter(addend.path)


def _with_added(reference: str) -> Checkpoint:
    """Open ``base+adapter``, ``base+vector:0.5+…``."""
    base_reference, added = references.parted(reference)
    base = open_checkpoint(base_reference)
    tensors, left_out, found = dict(base.tensors), dict(base.left_out), [*base.added]
    identity: Identity | None = None
    for addend in added:
        source = open_addend(addend)
        if isinstance(source, Vector) and not addend.rebase:
            identity = identity or base.identity()
            check_base(source, identity)
        tensors, unread = source.over(tensors, base.config, addend.scale)
        left_out |= unread
        found.append(Added(source, addend))
    return replace(
        base,
        reference=reference,
        files=(*base.files, *(each.source.file for each in found)),
        tensors=tensors,
        left_out=left_out,
        added=tuple(found),
    )


def check_base(vector: Vector, base: Identity) -> None:
    """Raise CheckpointError where a task vector was made from another base."""
    if not vector.base.is_of(base):
        differ = "weights" if vector.base.header == base.header else "tensors"
        raise CheckpointError(
            f"{vector.reference}: was made from {vector.base.reference}, whose {differ} are not those of "
            f"{base.reference}. Name that base; or, if the two models are close, add it all the same: "
            f"rebase:{vector.reference} in a reference or recipe, --rebase on the command line."
        )


def _open_file(reference: str, path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"{path}: GGUF holds requantised, renamed tensors. Use the safetensors the file was made from."
        )
    if path.suffix not in folders.WEIGHT_SUFFIXES:
        raise CheckpointError(
            f"{path}: not a weight file; expected one of {', '.join(folders.WEIGHT_SUFFIXES)}, or a folder."
        )
    return _assemble(reference, path, [path], index=None, config=None)


def _open_folder(reference: str, folder: Path, revision: str | None = None) -> Checkpoint:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: is a LoRA adapter, not a model. Name the model that it is for before it: BASE+{reference}"
        )
    files, index = folders.weight_files(folder)
    config_path = folder / "config.json"
    config = folders.read_json(folders.inside(folder, "config.json")) if config_path.exists() else None
    return _assemble(reference, folder, files, index, config, revision)


def _assemble(
    reference: str,
    path: Path,
    paths: list[Path],
    index: Mapping[str, str] | None,
    config: Mapping[str, Any] | None,
    revision: str | None = None,
) -> Checkpoint:
    files: list[WeightFile] = []
    tensors: dict[str, TensorSpec] = {}
    left_out: dict[str, str] = {}
    nest: tuple[str, ...] = ()
    twice: list[str] = []
    for file in paths:
        if file.suffix == ".safetensors":
            identity, found, metadata = safetensors_file.read_header(file)
            if vector_file.is_vector(metadata):
                raise CheckpointError(
                    f"{file}: is a task vector, not a model. Name the model it is added to: BASE+{reference}"
                )
        else:
            identity, found, nest, others = torch_file.read_layout(file)
            left_out |= dict.fromkeys(others, "not a tensor of the model's state")
        twice += [f"{name} (in {tensors[name].file.name} and {file.name})" for name in found if name in tensors]
        files.append(identity)
        tensors |= found
    if twice:
        raise CheckpointError(listing(f"{path}: these tensors are stored twice; it is not clear which is meant", twice))
    if index is not None:
        _check_index(path, index, tensors)
    logical, hidden = quantised.present(path, tensors, config)
    return Checkpoint(reference, path, tuple(files), logical, config, nest, left_out | hidden, revision)


def _check_index(folder: Path, index: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> None:
    wrong = [
        f"{name}: the index says {file}, "
        + (f"it is in {tensors[name].file.name}" if name in tensors else "no shard has it")
        for name, file in index.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    wrong += [
        f"{name}: is in {spec.file.name}, the index lacks it" for name, spec in tensors.items() if name not in index
    ]
    if wrong:
        raise CheckpointError(listing(f"{folder}: index and shards don't agree; download the folder again", wrong))
