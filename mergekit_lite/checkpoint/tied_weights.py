"""Tied weights: a model that has no output head of its own uses its input embedding as one."""

from __future__ import annotations

from collections.abc import Mapping

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


def is_head(name: str) -> bool:
    """Return whether a tensor is an output head by its name."""
    return _ends(name, HEADS)


def is_embedding(name: str) -> bool:
    """Return whether a tensor is an input embedding by its name."""
    return _ends(name, EMBEDDINGS)


def is_vocabulary(name: str) -> bool:
    """Return whether a tensor has one row for each token: an embedding, a head, or a head's bias."""
    return _ends(name, EMBEDDINGS + HEADS) or _ends(name, tuple(head.replace("weight", "bias") for head in HEADS))


def tied_to(name: str, tensors: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Return the embedding that serves as a head which ``tensors`` lacks, or None where there is not exactly one."""
    if not is_head(name) or name in tensors:
        return None
    embeddings = [spec for spec in tensors.values() if is_embedding(spec.name) and part(spec.name) == part(name)]
    return embeddings[0] if len(embeddings) == 1 else None


def part(name: str) -> str:
    """Return the folder that a tensor's name begins with, where its model is one of several in a folder."""
    return name.rpartition("/")[0]


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith((f".{ending}", f"/{ending}")) for ending in endings)


def counterpart(name: str, tensors: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Return the tensor of this name, or the embedding that a model without a head of this name uses as one."""
    return tensors.get(name) or tied_to(name, tensors)
