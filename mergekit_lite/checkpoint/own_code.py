"""Code of a model's own: the classes that its configs name, and the files in its folder that have them.

transformers finds such a class by ``auto_map`` in a config: ``module.Class`` is in a file beside it, and
``org/name--module.Class`` in a repository of the hub. Nothing of it is run here; its text is searched for the modules
that it imports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_lite import input_files
from mergekit_lite.checkpoint.checkpoint import Checkpoint
from mergekit_lite.checkpoint.folder import small_file
from mergekit_lite.checkpoint.parts import MODULES, in_folder
from mergekit_lite.checkpoint.references import plain_reference
from mergekit_lite.errors import CheckpointError

CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
           "image_processor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json",
           MODULES)  # fmt: skip
CLASS = re.compile(r"(?P<module>[A-Za-z_]\w{0,99})\.[A-Za-z_]\w{0,99}", re.ASCII)  # of a file beside the config
FROM_HUB = "--"  # between a repository and its module
OF_LIBRARY = "sentence_transformers."  # of its own modules
IMPORTS = re.compile(
    r"^[ \t]*from[ \t]+\.(?:(?P<one>[A-Za-z_]\w{0,99})[ \t]+import|[ \t]+import[ \t]+(?P<several>[\w, \t]+))",
    re.ASCII | re.MULTILINE,
)
MAX_CODE = 10_000_000  # bytes of a file


def code_names(content: object) -> list[str]:
    """Return the classes that a config, or a list of modules, names in files beside it: ``module.Class``."""
    if isinstance(content, list):
        types = [entry.get("type") for entry in content if isinstance(entry, dict)]
        named = [each for each in types if isinstance(each, str) and not each.startswith(OF_LIBRARY)]
        return [each for each in named if CLASS.fullmatch(each)]
    auto_map = content.get("auto_map") if isinstance(content, dict) else None
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    named = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return [each for each in named if isinstance(each, str) and CLASS.fullmatch(each)]


def from_hub(content: Any, repository: str) -> Any:
    """Return a config, or a list of modules, whose own classes are named in a repository of the hub."""
    own = set(code_names(content))

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(each) for each in value]
        return f"{repository}{FROM_HUB}{value}" if isinstance(value, str) and value in own else value

    if isinstance(content, list):
        return [{key: named(each) if key == "type" else each for key, each in entry.items()} for entry in content]
    return {**content, "auto_map": {key: named(value) for key, value in content["auto_map"].items()}}


def repository_of(source: Checkpoint) -> str | None:
    """Return the hub repository of a model or its base; None for a path."""
    return plain_reference(source.base_reference).partition("@")[0] if source.revision else None


def needed_files(source: Checkpoint, configs: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the files of code that are needed beside a model's configs: those that are there, and those missing.

    Args:
        source: the model. Code of a hub repository is found there by transformers, except by configs in its folders.
        configs: by their paths in the model's folder.
    """
    present: dict[str, None] = {}
    missing: dict[str, None] = {}
    unread: list[str] = []
    for name, content in configs.items():
        folder = name.rpartition("/")[0]
        if folder or repository_of(source) is None:
            modules = [named.partition(".")[0] for named in code_names(content)]
            unread += [in_folder(folder, f"{module}.py") for module in modules]
    while unread:
        name = unread.pop(0)
        if name in present or name in missing:
            continue
        text = _text(source.folder, name)
        if text is None:
            missing[name] = None
        else:
            present[name] = None
            unread += [in_folder(name.rpartition("/")[0], f"{module}.py") for module in _imported(text)]
    return list(present), list(missing)


def configs_of(source: Checkpoint, names: Mapping[str, object] | list[str]) -> dict[str, Any]:
    """Return the contents of those of a model's files, by their paths, that may name code; without unreadable ones."""
    contents: dict[str, Any] = {}
    for name in names:
        if source.folder is not None and name.rpartition("/")[2] in CONFIGS:
            try:
                path = small_file(source.folder, name)
                contents |= {name: input_files.parse_json(input_files.read_text(path))} if path else {}
            except (CheckpointError, ValueError):
                continue
    return contents


def _text(folder: Path | None, name: str) -> str | None:
    """Return the text of a file of code; None where it is not there, or may not be read."""
    try:
        path = small_file(folder, name) if folder else None
        return input_files.read_text(path, MAX_CODE) if path else None
    except CheckpointError:
        return None


def _imported(text: str) -> Iterator[str]:
    """Yield the modules beside it that a file of code imports, as transformers looks for them."""
    for match in IMPORTS.finditer(text):
        names = [match["one"]] if match["one"] else match["several"].split(",")
        yield from filter(None, (name.split()[0] if name.split() else "" for name in names))
