"""A teacher's distributions over the tokens of one response, and the key that a row of training finds them by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xxhash import xxh3_128

from mergekit_lite.answers.rows import Message

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class TaughtRow:
    """What a teacher says of a response of P tokens, in its own tokens.

    Position p has the distribution that token p was drawn from: the one after the prompt and the tokens before p.

    Attributes:
        key: of the conversation and its response, as of ``row_key``.
        tokens: (P,) int32; the response in the teacher's tokens, the end of the turn included.
        ends: (P,) int32; the bytes of the response's text that are consumed with each token
            (``alignment/spans.py``).
        log_probs: (P,) float32; log p of these tokens.
        top_ids: (P, K) int32; the likeliest tokens, the likeliest first; K may be 0.
        top_log_probs: (P, K) float32; their log-probabilities. What they leave of 1 is the tail's mass.
    """

    key: str
    tokens: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_log_probs: npt.NDArray[np.float32]

    @property
    def cross_entropy(self) -> float:
        """−mean log p of the response's tokens, in nats."""
        return -float(self.log_probs.mean(dtype="float64"))


def row_key(messages: Sequence[Message], response: str, *, cut: bool = False) -> str:
    """Return the digest of a conversation and the response to it: the same in any file and at any place."""
    turns = [[message["role"], message["content"]] for message in messages]
    return xxh3_128(json.dumps([turns, response, cut], ensure_ascii=True).encode()).hexdigest()
