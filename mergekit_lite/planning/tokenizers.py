"""The output's tokenizer and chat template: whose they are, and whether the models' vocabularies fit each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint import Checkpoint, companion_patterns
from mergekit_lite.checkpoint.companion_patterns import VOCABULARY_FILES, matches
from mergekit_lite.checkpoint.folder import small_file
from mergekit_lite.checkpoint.tokenizer_file import vocabulary_in
from mergekit_lite.errors import UnreadableError, counted, shortened
from mergekit_lite.input_files import read_bytes, read_json, read_text
from mergekit_lite.recipe.templates import TEMPLATES

TOKENIZER_CONFIG = "tokenizer_config.json"


def is_template_file(name: str) -> bool:
    """Return whether a file of a model folder holds a chat template and nothing else."""
    return matches(name, companion_patterns.TEMPLATES)


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file of a model folder is a part of its tokenizer, its chat template included."""
    return matches(name, companion_patterns.TOKENIZER)


def chat_template(asked: str, inputs: Sequence[Checkpoint]) -> str | None:
    """Return the text of the template that a recipe asks for by ``auto``, a name, or the template itself.

    ``auto`` is the one that most models have, of several the one listed first; None where no model has one.
    """
    if asked != "auto":
        return TEMPLATES.get(asked, asked)
    templates = Counter(template for source in inputs if (template := template_of(source)) is not None)
    return templates.most_common(1)[0][0] if templates else None  # most_common keeps the order of equal counts


def template_of(source: Checkpoint) -> str | None:
    """Return a model's own chat template, found as transformers finds it; None where there is none.

    Raises CheckpointError where the file that holds it is a link out of the model's folder, or can't be read.
    """
    if source.tokenizer_folder is None:
        return None
    if path := small_file(source.tokenizer_folder, "chat_template.jinja"):
        return read_text(path)
    for name in (TOKENIZER_CONFIG, "chat_template.json"):
        path = small_file(source.tokenizer_folder, name)
        template = read_json(path).get("chat_template") if path else None
        if isinstance(template, list):  # several by name
            default = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
            template = next(default, {}).get("template")
        if isinstance(template, str):
            return template
    return None


def tokenizer_config(source: Checkpoint) -> dict[str, Any] | None:
    """Return the config of a model's tokenizer, None where it has none. Raises CheckpointError where it is broken."""
    path = small_file(source.tokenizer_folder, TOKENIZER_CONFIG) if source.tokenizer_folder else None
    return read_json(path) if path else None


def vocabulary_of(source: Checkpoint) -> dict[int, str]:
    """Return the tokens of a model's ``tokenizer.json`` by their numbers; empty where there is none.

    Raises CheckpointError where it can't be read.
    """
    path = _file(source)
    return _vocabulary(path) if path else {}


def foreign_vocabularies(inputs: Sequence[Checkpoint], tokenizer: Checkpoint) -> tuple[list[str], list[str]]:
    """Compare the models' vocabularies with that of the output's tokenizer.

    Returns:
        Models in which some rows stand for other tokens, and what else the user should know: models that have tokens
        more, and those whose vocabulary can't be read. Each is a message.

    Raises:
        CheckpointError: a ``tokenizer.json`` leads out of its folder, or is no regular file.
    """
    if not (own := _file(tokenizer)):
        return [], []
    content = read_bytes(own)
    contrary: list[str] = []
    more: list[str] = []
    vocabulary: Mapping[int, str] | None = None
    for source in inputs:
        path = _file(source)
        if path is None or path == own or read_bytes(path) == content:
            continue
        try:
            vocabulary = _vocabulary(own) if vocabulary is None else vocabulary
            other = _vocabulary(path)
        except UnreadableError as error:
            more.append(f"{error} Whether the vocabularies agree can't be told")
            continue
        wrong = [number for number, token in other.items() if vocabulary.get(number, token) != token]
        if wrong:
            example = f"{wrong[0]} is {_quoted(vocabulary[wrong[0]])}, but {_quoted(other[wrong[0]])}"
            differ = f"{counted(len(wrong), 'token')} differ between the tokenizers"
            contrary.append(f"{differ}: {example} in {source.reference}")
        if new := [token for number, token in other.items() if number not in vocabulary]:
            listed = ", ".join(map(_quoted, new[:3])) + (" …" if len(new) > 3 else "")
            has = f"{source.reference} has {counted(len(new), 'token')}"
            more.append(f"{has} that the output's tokenizer lacks: {listed}")
    return contrary, list(dict.fromkeys(more))


def vocabulary_files(source: Checkpoint) -> list[bytes]:
    """Return the contents of what holds a model's tokens."""
    files = [small_file(source.tokenizer_folder, name) for name in VOCABULARY_FILES] if source.tokenizer_folder else []
    return [read_bytes(path) for path in files if path]


def _file(source: Checkpoint) -> Path | None:
    return small_file(source.tokenizer_folder, "tokenizer.json") if source.tokenizer_folder else None


def _vocabulary(path: Path) -> dict[int, str]:
    return vocabulary_in(read_json(path))


def _quoted(token: str) -> str:
    return json.dumps(shortened(token, 30), ensure_ascii=False)
