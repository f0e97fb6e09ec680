"""Tied weights: a model that has no output head of its own uses its input embedding as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergekit_lite.checkpoint.tensor import TensorSpec

HEADS = ("lm_head.weight", "output.weight", "embed_out.weight", "decoder.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
    "shared.weight",
)
# T5's and Whisper's, beside the embedding
COPIES = re.compile(r"(^|[./])((en|de)coder\.embed_tokens|proj_out)\.weight$")
# Every tensor with one row for each token: an embedding, a head, or a head's bias.
VOCABULARY = re.compile(
    rf"(^|[./])({'|'.join(map(re.escape, EMBEDDINGS + HEADS + tuple(h.replace('weight', 'bias') for h in HEADS)))})$"
)
NUMBER = re.compile(r"\.\d+\.")  # of a layer


def is_head(name: str) -> bool:
    """Return whether a tensor is an output head by its name."""
    return _ends(name, HEADS)


def is_embedding(name: str) -> bool:
    """Return whether a tensor is an input embedding by its name."""
    return _ends(name, EMBEDDINGS)


def may_be_tied(name: str) -> bool:
    """Return whether a tensor may be the embedding once more, by its name: a head, or a further copy."""
    return is_head(name) or COPIES.search(name) is not None


def is_vocabulary(name: str) -> bool:
    """Return whether a tensor has one row for each token: an embedding, a head, or a head's bias."""
    return VOCABULARY.search(name) is not None


def is_of_tokens(name: str, tensors: Mapping[str, TensorSpec]) -> bool:
    """Return whether a tensor of a model has one row for each token: by its name, or as it is the embedding once more.

    A head such as Whisper's ``proj_out.weight`` is one where it has an embedding's shape; other models call so what
    has nothing to do with tokens. One that ``tensors`` lacks is the embedding.
    """
    if is_vocabulary(name) or not may_be_tied(name):
        return is_vocabulary(name)
    embeddings = {spec.shape for spec in tensors.values() if is_embedding(spec.name)}
    return tensors[name].shape in embeddings if name in tensors else len(embeddings) == 1


def tied_to(name: str, tensors: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Return the embedding that serves as a head or copy which ``tensors`` lacks; None where it is not certain.

    There has to be exactly one embedding, copies of it aside, and for a head no other head under another name.
    """
    if not may_be_tied(name) or name in tensors:
        return None
    others = [other for other in tensors if is_head(other) and part(other) == part(name) and not NUMBER.search(other)]
    if is_head(name) and others:
        return None
    embeddings = [spec for spec in tensors.values() if is_embedding(spec.name) and part(spec.name) == part(name)]
    first = [spec for spec in embeddings if not COPIES.search(spec.name)] or embeddings
    return first[0] if len(first) == 1 else None


def repeated_by(name: str, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> TensorSpec | None:
    """Return the embedding that a stored head or copy repeats, where the model's config ties the two; else None.

    T5's embeddings of encoder and decoder are the shared one, whatever the config says of the head.
    """
    if not may_be_tied(name):
        return None
    first = tied_to(name, {other: spec for other, spec in tensors.items() if other != name})
    tied = (config or {}).get("tie_word_embeddings", None if is_head(name) else True)
    shared = first is not None and not is_head(name) and first.name.endswith("shared.weight")
    return first if tied is True or shared else None


def part(name: str) -> str:
    """Return the folder that a tensor's name begins with, where its model is one of several in a folder."""
    return name.rpartition("/")[0]


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith((f".{ending}", f"/{ending}")) for ending in endings)


def counterpart(name: str, tensors: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Return the tensor of this name, or the embedding that a model without a head of this name uses as one."""
    return tensors.get(name) or tied_to(name, tensors)
