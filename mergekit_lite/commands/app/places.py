"""Folders that the page may read: those below its root, and the cache of the hub."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path

from mergekit_lite.checkpoint import hub
from mergekit_lite.errors import CheckpointError, UsageError, nearest
from mergekit_lite.plain_text import is_plain_line
from mergekit_lite.recipe.documents import document_in
from mergekit_lite.yaml_document import Fields, Items, Node, Remark, Scalar

DEPTH = 3  # folders below the root in which models are looked for
MOST_MODELS = 500
MODELS = ("model", "base_model")  # keys of a recipe that name one
WEIGHTS = (".safetensors", ".gguf")
ELSEWHERE = re.compile(r"(^|[+:=>])[\w.-]+://")  # an address, alone or as a part of a reference
BY_RANGE = re.compile(r"(^|[+=>])hf://(?=[\w.-]+/)")  # before a repository that is read by range in any case
NAME = re.compile(r"\w[\w.-]{0,100}")


def hub_cache() -> Path:
    """Return the folder in which the hub's library keeps what it downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@dataclass(frozen=True)
class Places:
    """The root, which is the process's folder too, and the hub's cache."""

    root: Path
    cache: Path
    is_public = False  # whether anybody may use the page (public.py)

    def may_read(self, path: Path) -> bool:
        """Whether a path, with all links followed, lies below the root or in the cache."""
        resolved = path.resolve()
        return any(resolved.is_relative_to(folder.resolve()) for folder in (self.root, self.cache))

    def refusal(self, reference: str) -> str:
        """Return why the page does not read what a text would name as a reference; empty where it may.

        Any text may be asked: one that names no path lies below the root, as a path. Of a folder, what lies in it may
        not lead out either. ``hf://org/name`` is the repository, which no process asks for that may not.
        """
        reference = BY_RANGE.sub(r"\1", reference)
        if ELSEWHERE.search(reference):
            return f"{reference!r} is elsewhere: the page reads folders below its root, and the cache of the hub"
        for part in _paths(reference):
            if NAME.fullmatch(part) and not os.path.lexists(f"{self.root}/{part}"):
                continue  # nothing, below the root: most texts of a recipe, of which there may be many thousands
            try:
                if part.startswith("~") or not all(map(self.may_read, self._meant(part))):
                    return f"{part!r} leads out of {self.root}, the root of this page: start it with another --root"
            except (OSError, ValueError, RuntimeError) as error:  # no access; a NUL byte; links in a circle
                if getattr(error, "errno", None) != errno.ENAMETOOLONG:  # no path at all, as a chat template
                    return f"{part!r} can't be read: {error}"
        return ""

    def _meant(self, part: str) -> Iterator[Path]:
        """Yield what a path means: itself and what lies in it, or where a pattern begins, and all that fits it."""
        names = [part]
        if has_magic(part):
            yield self.root.joinpath(*takewhile(lambda name: not has_magic(name), Path(part).parts))
            # Path.glob takes no pattern that begins at the root
            names = glob(part, root_dir=self.root)  # noqa: PTH207
        for path in map(self.root.joinpath, names):
            yield from (path, *(path.iterdir() if path.is_dir() else ()))

    def missing(self, reference: str) -> str:
        """Return why a model is not to be had, with the nearest name; empty where it is, or may be.

        Of a sum only what the hub alone may have is looked for; all else of references is left to what opens them.
        """
        if BY_RANGE.search(reference):
            return f"{reference!r} is read by range: tick that in the tab Run, which plans and runs it so"
        if self.is_of_hub(reference):
            if self.is_kept(reference):
                return ""
            said = f"{reference!r} is no folder here, and the hub's cache has not all of it"
            remedy = "the tab Models tells what its download takes, and the tab Run reads it by range"
            return f"{said}: {remedy}.{nearest(reference, self.models())}"
        base, *added = reference.split("+")
        parts = [(base, False), *((each.partition(":")[0], True) for each in added)]
        if added and (
            away := [part for part, adapter in parts if self.is_of_hub(part) and not self.is_kept(part, adapter)]
        ):
            remedy = f"the tab Run reads it by range, and the command downloads it: mergekit-lite inspect {reference}"
            return f"the hub's cache has not all of {' and '.join(away)}: {remedy}"
        if re.search("[+:@]", reference) or _exists(self.root / reference):
            return ""
        return f"there is no model {reference!r} below {self.root}.{nearest(reference, self.models())}"

    def is_of_hub(self, reference: str) -> bool:
        """Whether a reference names a repository of the hub, and nothing below the root."""
        if BY_RANGE.match(reference):
            return hub.is_repository(reference.removeprefix("hf://"))
        return hub.is_repository(reference) and not _exists(self.root / reference)

    def is_kept(self, reference: str, adapter: bool = False) -> bool:
        """Whether the hub's cache has all that is needed of a repository: of a model, or of a LoRA adapter."""
        folder = self.cache / f"models--{reference.partition('@')[0].replace('/', '--')}"
        if not _exists(folder):
            return False
        try:
            hub.fetch(reference, adapter=adapter)  # which asks nobody: the page is offline
        except CheckpointError:
            return False
        return True

    def of_hub(self, tree: Node) -> Iterator[str]:
        """Yield the models of a recipe that are repositories of the hub, and not kept here."""
        if isinstance(tree, Fields):
            for key, value in tree.entries:
                name = value.value if key.text in MODELS and isinstance(value, Scalar) else None
                if isinstance(name, str) and self.is_of_hub(name) and not self.is_kept(name):
                    yield name.removeprefix("hf://")
                yield from self.of_hub(value)
        elif isinstance(tree, Items):
            for item in tree.items:
                yield from self.of_hub(item)

    def problems(self, tree: Node, names: Collection[str] = (), *, streamed: bool = False) -> Iterator[Remark]:
        """Yield every text of a recipe that would lead out, and every model that is missing, at its place.

        A model may be the result of a document of the recipe: ``names`` are those. Where models are ``streamed``, none
        of the hub is missing.
        """
        if isinstance(tree, Scalar) and isinstance(tree.value, str):
            if why := self.refusal(tree.value):
                yield Remark(tree.at, why)
        elif isinstance(tree, Items):
            for item in tree.items:
                yield from self.problems(item, names, streamed=streamed)
        elif isinstance(tree, Fields):
            for key, value in tree.entries:
                if key.text == "chat_template":  # a name or the text itself, never a path
                    continue
                found = list(self.problems(value, names, streamed=streamed))
                yield from found
                name = value.value if key.text in MODELS and isinstance(value, Scalar) else None
                if not isinstance(name, str) or found or document_in(name, names):
                    continue
                if streamed and (self.is_of_hub(name) or BY_RANGE.search(name)):
                    continue
                if why := self.missing(name):
                    yield Remark(value.at, why)

    def output(self, name: str) -> str:
        """Return the name of an output in the root as it is. Raises UsageError where it is none."""
        if not NAME.fullmatch(name):
            raise UsageError(
                f"The output is a folder in {self.root}: a name of letters, digits, '.', '_', '-'; got {name!r}."
            )
        return name

    def models(self) -> list[str]:
        """Return the models that may be chosen: folders with weights below the root, then those of the cache.

        The nearest ones come first. A name that can't be shown can't be chosen.
        """
        found = sorted(_with_weights(self.root, DEPTH), key=lambda folder: (len(folder.parts), folder))[:MOST_MODELS]
        here = [f"./{folder.relative_to(self.root).as_posix()}" for folder in found if self.may_read(folder)]
        kept = [path.name.split("--") for path in sorted(self.cache.glob("models--*--*/")) if path.is_dir()]
        return [*filter(is_plain_line, here), *("/".join(parts[1:]) for parts in kept if len(parts) == 3)]


def _exists(path: Path) -> bool:
    """Whether a path exists; one that no file can have does not."""
    with suppress(OSError, ValueError):
        return path.exists()
    return False


def _paths(reference: str) -> Iterator[str]:
    """Yield whatever a reference may take for a path: its whole, its summands, and what its signs separate.

    All meanings are looked at, since which one holds depends on what is there (``ckpt.pt:ema``, ``hf=A:B``).
    """
    yield from {reference, *reference.split("+"), *re.split("[+:=>]", reference)} - {""}


def _with_weights(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError:
        return
    if any(entry.name.endswith(WEIGHTS) for entry in entries):
        yield folder
    for entry in entries:
        if depth and entry.is_dir(follow_symlinks=False):
            yield from _with_weights(Path(entry.path), depth - 1)
