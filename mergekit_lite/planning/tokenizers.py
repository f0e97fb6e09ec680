"""The output's tokenizer and chat template: whose they are, and whether the models' vocabularies fit each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.folder import read_json, small_file
from mergekit_lite.errors import CheckpointError, counted, shortened
from mergekit_lite.recipe.templates import TEMPLATES

# What a model folder calls the parts of its tokenizer.
TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model",
    "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
VOCABULARY_FILES = ("merges.txt", "sentencepiece.bpe.model", "spiece.model", "tekken.json", "tokenizer.json",
                    "tokenizer.model", "vocab.json", "vocab.txt")  # fmt: skip
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
MORE_TEMPLATES = "additional_chat_templates/"


def is_template_file(name: str) -> bool:
    """Return whether a file of a model folder holds a chat template and nothing else."""
    return name in TEMPLATE_FILES or name.startswith(MORE_TEMPLATES)


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file of a model folder is a part of its tokenizer, its chat template included."""
    return name in TOKENIZER_FILES or is_template_file(name)


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

    Raises CheckpointError where the file that holds it is a link out of the model's folder, or too large.
    """
    if source.folder is None:
        return None
    if path := small_file(source.folder, "chat_template.jinja"):
        return path.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _json(small_file(source.folder, name)).get("chat_template")
        if isinstance(template, list):  # several by name
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def vocabulary_of(source: Checkpoint) -> dict[int, str]:
    """Return the tokens of a model's ``tokenizer.json`` by their numbers; empty where none is understood."""
    return _vocabulary(_file(source))


def foreign_vocabularies(inputs: Sequence[Checkpoint], tokenizer: Checkpoint) -> tuple[list[str], list[str]]:
    """Compare the models' vocabularies with that of the output's tokenizer.

    Returns:
        Models in which some rows stand for other tokens, and models that have tokens more, each as a message.
    """
    if not (own := _file(tokenizer)):
        return [], []
    content = own.read_bytes()
    contrary: list[str] = []
    more: list[str] = []
    vocabulary: Mapping[int, str] | None = None
    for source in inputs:
        path = _file(source)
        if path is None or path == own or path.read_bytes() == content:
            continue
        vocabulary = _vocabulary(own) if vocabulary is None else vocabulary
        other = _vocabulary(path)
        wrong = [number for number, token in other.items() if vocabulary.get(number, token) != token]
        if wrong:
            example = f"{wrong[0]} is {_quoted(vocabulary[wrong[0]])}, but {_quoted(other[wrong[0]])}"
            differ = f"{counted(len(wrong), 'token')} differ between the tokenizers"
            contrary.append(f"{differ}: {example} in {source.reference}")
        if new := [token for number, token in other.items() if number not in vocabulary]:
            listed = ", ".join(map(_quoted, new[:3])) + (" …" if len(new) > 3 else "")
            has = f"{source.reference} has {counted(len(new), 'token')}"
            more.append(f"{has} that the output's tokenizer lacks: {listed}")
    return contrary, more


def other_tokens(inputs: Sequence[Checkpoint], tokenizer: Checkpoint) -> list[str]:
    """Return a message for each model whose tokens aren't those of ``tokenizer``: their union is another one."""
    own = _tokens(tokenizer)
    return [
        f"tokenizer: union of {tokenizer.reference} and {source.reference}, whose tokens differ, is not supported yet: "
        "give 'base' or one of the models, all with the same vocabulary"
        for source in inputs
        if source is not tokenizer and _tokens(source) != own
    ]


def _tokens(source: Checkpoint) -> Mapping[int, str] | list[bytes]:
    """Return the tokens of a model, or what holds them where that isn't a ``tokenizer.json``."""
    if vocabulary := vocabulary_of(source):
        return vocabulary
    paths = [small_file(source.folder, name) for name in VOCABULARY_FILES] if source.folder else []
    return [path.read_bytes() for path in paths if path]


def _file(source: Checkpoint) -> Path | None:
    return small_file(source.folder, "tokenizer.json") if source.folder else None


def _vocabulary(path: Path | None) -> dict[int, str]:
    content = _json(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[int, str] = {}
    if isinstance(vocabulary, dict):
        tokens = {number: token for token, number in vocabulary.items() if isinstance(number, int)}
    elif isinstance(vocabulary, list):  # unigram: [token, score], numbered by their order
        tokens = {number: str(entry[0]) for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            tokens[token["id"]] = str(token.get("content"))
    return tokens


def _json(path: Path | None) -> dict[str, object]:
    """Return a JSON object; empty where it can't be read: the file travels as it is, this only looks into it."""
    try:
        return read_json(path) if path else {}
    except CheckpointError:
        return {}


def _quoted(token: str) -> str:
    return json.dumps(shortened(token, 30), ensure_ascii=False)
