"""What becomes of a base when an adapter or a task vector is added to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mergekit_lite.checkpoint.tensor import TensorSpec


class Folded(NamedTuple):
    """A base with an adapter or a task vector folded in."""

    tensors: Mapping[str, TensorSpec]  # by name
    config: Mapping[str, Any] | None  # the base's, but where the new tensors say otherwise
    left_out: Mapping[str, str]  # why each tensor of either that is not read is left out
    notes: tuple[str, ...] = ()  # what the user should know
    has_tokenizer: bool = False  # whether the vocabulary is no longer the base's, so that its tokenizer isn't either
