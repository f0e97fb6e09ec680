"""Open a checkpoint by its reference: find its files, read their headers, say what it holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint import adapter as adapters
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint import quantised, safetensors_file, torch_file
from mergekit_lite.checkpoint.adapter import Adapter
from mergekit_lite.checkpoint.tensor import TensorSpec, WeightFile
from mergekit_lite.errors import CheckpointError, listing


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
        adapter: the LoRA adapter that is folded in, if any.
    """

    reference: str
    path: Path
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any] | None = None
    nest: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    adapter: Adapter | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every folder or file that is read."""
        return (self.path, self.adapter.path) if self.adapter else (self.path,)

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
            ``org/name`` or ``org/name@revision``; or one of these, ``+``, and the folder or hub repository of a LoRA
            adapter, which is folded in when weights are read.

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
    if "+" in text:
        return _with_adapter(text)
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


def _with_adapter(reference: str) -> Checkpoint:
    """Open ``base+adapter``."""
    base_reference, adapter_reference = _halves(reference)
    base, adapter = open_checkpoint(base_reference), open_adapter(adapter_reference)
    if base.adapter is not None:
        raise CheckpointError(f"{reference}: folds in two adapters; expected BASE+ADAPTER. Make the first model first.")
    tensors, left_out = adapter.over(base.tensors, base.config)
    return replace(
        base,
        reference=reference,
        files=(*base.files, adapter.file),
        tensors=tensors,
        left_out={**base.left_out, **left_out},
        adapter=adapter,
    )


def _halves(reference: str) -> tuple[str, str]:
    """Base and adapter: where a path has a plus of its own, the cut that leaves two things that can be opened."""
    from mergekit_lite.checkpoint import hub

    cuts = [match.start() for match in re.finditer(r"\+", reference)]
    halves = [(reference[:cut], reference[cut + 1 :]) for cut in cuts]
    with _opening(reference):
        sound = [p for p in halves if all(Path(half).expanduser().exists() or hub.is_repository(half) for half in p)]
    if len(halves) > 1 and not sound:
        raise CheckpointError(f"{reference}: no such file or folder, and no BASE+ADAPTER of which both are there.")
    if len(sound) > 1:
        raise CheckpointError(
            f"{reference}: can be cut at several pluses into a base and an adapter. Rename a folder, or link to it."
        )
    return (sound or halves)[0]


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
            identity, found, _ = safetensors_file.read_header(file)
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
