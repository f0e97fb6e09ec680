"""A checkpoint: named tensors on some storage, known from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lite.checkpoint import references
from mergekit_lite.checkpoint.adapters.adapter import Adapter
from mergekit_lite.checkpoint.formats.header import WeightFile
from mergekit_lite.checkpoint.identity import Identity, identify
from mergekit_lite.checkpoint.parts import VALUE_HEAD, Part, in_folder
from mergekit_lite.checkpoint.references import Addition
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.checkpoint.vector_file import Vector
from mergekit_lite.errors import CheckpointError
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
        notes: what the user should know about which weights are read, and under which names.
        home: the folder with config and tokenizer, where it isn't ``path``.
        tokenizer_home: the folder with the tokenizer, where it isn't ``folder``.
        in_shards: whether an output can have its tensors in files like these; False where they are in pieces.
        parts: the sets of weight files that it is made of, in the order of their folders.
        stands_for: the beginning of the names in the base of a merge, where it stands for that part of it alone.
        config_made: how ``config`` was made of a GGUF's header, or why it wasn't, where there is no ``config.json``.
        made_of: of the result of a recipe's document, the models that it is made of, without their tensors.
        made_while_read: the documents whose results are made while they are read, this one first, where its tensors are
            made of those models so: then its own files are not there.
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
    notes: tuple[str, ...] = ()
    home: Path | None = None
    tokenizer_home: Path | None = None
    in_shards: bool = True
    parts: tuple[Part, ...] = (Part(),)
    config_made: str = ""
    stands_for: str = ""
    made_of: tuple[Checkpoint, ...] = ()
    made_while_read: tuple[str, ...] = ()

    def part_of(self, name: str) -> Part:
        """Return the part that a tensor is of: by its file; for one that no part's file holds, by its name."""
        if len(self.parts) == 1:
            return self.parts[0]
        spec = self.tensors.get(name)
        for part in self.parts:
            if spec is not None and any(file.path == spec.file for file in part.files):
                return part
        by_name = [
            part for part in self.parts if name.startswith(in_folder(part.folder, "")) and part.stem != VALUE_HEAD
        ]
        return max(by_name, key=lambda part: len(part.folder), default=self.parts[0])

    def config_of(self, name: str) -> Mapping[str, Any] | None:
        """Return the config of the part that a tensor is of; that of its folder, where the part has none."""
        return self.configs.get(self.part_of(name).folder)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The configs of all parts, by the folders they lie in; empty for the model's own."""
        own = {} if self.config is None else {"": self.config}
        return own | {part.folder: part.config for part in self.parts if part.folder and part.config is not None}

    @property
    def models(self) -> dict[str, Checkpoint]:
        """The model that each folder holds, by the folder, with its tensors under their own names."""
        if not self.is_of_several:
            return {"": self}
        tensors: dict[str, dict[str, TensorSpec]] = {part.folder: {} for part in self.parts}
        for name, spec in self.tensors.items():
            folder = self.part_of(name).folder
            bare = name.removeprefix(in_folder(folder, ""))
            tensors[folder][bare] = replace(spec, name=bare)
        return {
            folder: replace(
                self, path=self.path / folder, tensors=own, config=self.configs.get(folder), parts=(Part(),)
            )
            for folder, own in tensors.items()
        }

    @property
    def is_of_several(self) -> bool:
        """Whether it has parts in folders of their own, so that no single file can hold it."""
        return any(part.folder for part in self.parts)

    @property
    def of_several(self) -> str:
        """What to say where one model is needed and this is a folder of several; empty for one model."""
        folders = [part.folder for part in self.parts if part.folder]
        if not folders:
            return ""
        named = f"{self.reference}/{folders[0]}"
        return f"{self.reference}: is a folder of several models ({', '.join(folders)}); name one of them: {named}"

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every folder or file that is read, for this model or for those that it is made of."""
        behind = (path for model in self.made_of for path in model.paths)
        return (self.path, *(each.source.path for each in self.added), *behind)

    @property
    def files_read(self) -> tuple[WeightFile, ...]:
        """The weight files that its tensors are read from: its own, or those of the models that it is made of."""
        if not self.made_while_read:
            return self.files
        added = (each.source.file for each in self.added)
        return (*(file for model in self.made_of for file in model.files), *added)

    @property
    def base_reference(self) -> str:
        """The reference without what is added."""
        if self.made_of:  # the name of a document, which has no plus
            return self.reference.partition("+")[0]
        return references.split_reference(self.reference)[0] if self.added else self.reference

    def identity(self) -> Identity:
        """Return what a task vector recognises it by; some kilobytes of each tensor are read."""
        return identify(self.reference, self.revision, self.tensors)

    @property
    def folder(self) -> Path | None:
        """The folder with config and tokenizer, or None for a bare file."""
        return self.home or (self.path if self.path.is_dir() else None)

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder with its tokenizer, if any."""
        return self.tokenizer_home or self.folder

    def check_names(self) -> None:
        """Raise CheckpointError where the reference, or the name of a weight file, can't be put into a manifest."""
        for name in (self.reference, *(file.name for file in self.files)):
            if not is_plain_line(name):
                raise CheckpointError(f"{name}: {NOT_PLAIN}. Rename it, or link to it by another name.")

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a weight file is no longer the one that was opened."""
        for file in self.files_read:
            file.check_unchanged()
