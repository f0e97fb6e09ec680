"""Parts of a model's folder: sets of weight files that are loaded one by one.

Most folders are one part. A diffusers pipeline has one in each folder that its ``model_index.json`` lists (``unet/``,
``text_encoder/`` …), a sentence-transformers model one in each module of its ``modules.json`` that has weights (its
own folder or ``0_Transformer/``, ``2_Dense/`` …); the value head of a reinforcement learner lies in a file of its own.
A tensor of a part in a folder goes by the path: ``unet/conv_in.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite import input_files
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint.formats.header import WeightFile
from mergekit_lite.errors import CheckpointError, listing

PIPELINE = "model_index.json"  # of diffusers: a folder for each component, with its library and class
MODULES = "modules.json"  # of sentence-transformers: the modules in order, with the folder and class of each
ROUTER = "router_config.json"  # of a module that has modules of its own
LISTS = (PIPELINE, MODULES, ROUTER)
MODEL, DIFFUSION, VALUE_HEAD = "model", "diffusion_pytorch_model", "value_head"  # what weight files are called
FOLDER = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}(/[A-Za-z0-9_][\w.-]{0,99})?", re.ASCII)  # of a part
VARIANT = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model)"
    r"(\.(?P<one>[A-Za-z]\w*)(-\d{5}-of-\d{5})?|-\d{5}-of-\d{5}\.(?P<other>[A-Za-z]\w*))\.(safetensors|bin)"
)
# Ends of the classes that have no weights, and of the modules that do.
WEIGHTLESS = ("Tokenizer", "TokenizerFast", "Scheduler", "FeatureExtractor", "ImageProcessor", "Processor")
WEIGHTED = ("Transformer", "CLIPModel", "Dense", "LayerNorm", "StaticEmbedding", "WordEmbeddings", "CNN", "LSTM",
            "WeightedLayerPooling", "SparseAutoEncoder")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        folder: where it lies in the model's folder; empty for that folder itself, and for a single file.
        stem: what its files are called in an output, before ``.safetensors`` and the numbers of shards.
        config: the folder's ``config.json``, if any.
        files: its weight files.
    """

    folder: str = ""
    stem: str = MODEL
    config: Mapping[str, Any] | None = None
    files: tuple[WeightFile, ...] = ()

    @property
    def variant(self) -> str:
        """The variant that its files' names tell, for instance ``fp16``; empty where they are the plain ones."""
        named = [match["one"] or match["other"] for file in self.files if (match := VARIANT.fullmatch(file.path.name))]
        return named[0] if named else ""


def in_folder(folder: str, name: str) -> str:
    """Return the path of a file, or the name of a tensor, of a folder in a model's folder."""
    return f"{folder}/{name}" if folder else name


def listed_folders(where: object, names: Collection[str], read: Callable[[str], Any]) -> dict[str, str]:
    """Return the folders that a pipeline or a list of modules names, with the class of each; none for other models.

    Args:
        where: what errors name.
        names: the paths of the model's files.
        read: returns the content of one of its JSON files.

    Raises:
        CheckpointError: a list names what can't be a folder of this model.
    """
    if PIPELINE in names:
        entries = read(PIPELINE)
        listed = {
            name: entry[1]
            for name, entry in (entries.items() if isinstance(entries, dict) else ())
            if isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)
            if not name.startswith("_")
        }
    elif MODULES in names:
        entries = read(MODULES)
        modules = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        listed = {str(entry.get("path", "")).rstrip("/"): str(entry.get("type", "")) for entry in modules}
        for outer in [*listed]:
            if in_folder(outer, ROUTER) in names:
                routed = read(in_folder(outer, ROUTER))
                types = routed.get("types") if isinstance(routed, dict) else None
                routes = types.items() if isinstance(types, dict) else ()
                listed |= {in_folder(outer, inner): str(kind) for inner, kind in routes}
    else:
        return {}
    root = {""} if MODULES in names and PIPELINE not in names else set()  # a module may lie in the model's own folder
    if strange := [ascii(folder)[:80] for folder in listed.keys() - root if not FOLDER.fullmatch(folder)]:
        raise CheckpointError(listing(f"{where}: lists what can't be folders of this model", strange))
    return listed


def weighted_folders(where: object, names: Collection[str], listed: Mapping[str, str]) -> list[str]:
    """Return which of a model's folders hold weights, in order; for a plain model its own.

    Args:
        where: what errors name.
        names: the paths of the model's files.
        listed: its folders with their classes.

    Raises:
        CheckpointError: a folder lacks the weights that its class has.
    """
    if not listed:
        return [""]
    having = {name.rpartition("/")[0] for name in names if folders.may_be_weights(name.rpartition("/")[2])}
    missing = [
        f"{folder or '.'}/ ({kind.rpartition('.')[2]})"
        for folder, kind in listed.items()
        if folder not in having and _has_weights(folder, kind, names)
    ]
    if missing:
        raise CheckpointError(listing(f"{where}: these folders lack their weights; download them again", missing))
    return sorted(folder for folder in listed if folder in having) or [""]


def _has_weights(folder: str, kind: str, names: Collection[str]) -> bool:
    """Return whether a folder that holds no weights should, by the class that is loaded from it."""
    if PIPELINE in names:
        is_there = any(name.startswith(f"{folder}/") for name in names)
        return not kind.endswith(WEIGHTLESS) and (in_folder(folder, "config.json") in names or not is_there)
    return kind.endswith(WEIGHTED) and in_folder(folder, ROUTER) not in names


def surveyed(root: Path) -> tuple[set[str], dict[str, str]]:
    """Return the paths of the files in a model's folder and in those that it lists; and these, with their classes.

    Raises CheckpointError where a list can't be read or leads elsewhere.
    """
    names, listed = _names(root, ""), dict[str, str]()
    for _ in LISTS[1:]:  # a router's modules are known once its own folder is
        listed = listed_folders(root, names, lambda name: _read(root, name))
        names |= {name for folder in listed for name in _names(root, folder)}
    return names, listed


def model_parts(root: Path) -> list[Part]:
    """Return the parts of a model's folder, without their files, in the order of their folders.

    Raises CheckpointError where a part lacks its weights, or a list of folders can't be read or leads elsewhere.
    """
    names, listed = surveyed(root)
    parts = []
    for folder in weighted_folders(root, names, listed):
        own = {name.rpartition("/")[2] for name in names if name.rpartition("/")[0] == folder}
        config = folders.small_file(root, in_folder(folder, "config.json"))
        is_of_diffusers = any(name.startswith(DIFFUSION) for name in folders.weight_names(root / folder, own))
        stem = DIFFUSION if is_of_diffusers else MODEL
        parts.append(Part(folder, stem, input_files.read_json(config) if config else None))
        parts += [Part(folder, VALUE_HEAD)] * (folders.value_head(own) is not None)
    return parts


def _names(root: Path, folder: str) -> set[str]:
    try:
        paths = list((root / folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise CheckpointError(f"{root / folder}: can't be read: {error.strerror}") from error
    return {in_folder(folder, path.name) for path in paths}


def _read(root: Path, name: str) -> Any:
    """Return the content of a JSON file of a model. Raises CheckpointError where it isn't one, or a link leads out."""
    path = folders.inside(root, name)
    try:
        return input_files.parse_json(input_files.read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
