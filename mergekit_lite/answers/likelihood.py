"""Log-probabilities of given texts under a loaded model, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergekit_lite.answers.rows import Message
from mergekit_lite.answers.template import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LogProb(NamedTuple):
    """The log-probability of some tokens given those before them, Σ_t log π(y_t | x, y_<t), and their number."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """The mean log-probability of a token."""
        return self.total / self.tokens

    @property
    def is_finite(self) -> bool:
        """Whether it is neither NaN nor infinite."""
        return math.isfinite(self.total)


class Pair(NamedTuple):
    """A preference: of two responses to a conversation, the chosen one is better."""

    messages: Sequence[Message]
    chosen: str
    rejected: str


def log_probs(model: PreTrainedModel, rows: Sequence[Tokens], batch_size: int = 8) -> list[LogProb]:
    """Return the log-probability of each response given its prompt, in order.

    Args:
        model: a causal language model with a head that ``logprobs.check_head`` accepts.
        rows: tokens, no more than the model takes; the first of a row is never scored, for nothing predicts it.
        batch_size: rows that are read at once; they have similar lengths.
    """
    import torch

    from mergekit_lite.answers.logprobs import padded, response_log_probs

    by_place: dict[int, LogProb] = {}
    with torch.inference_mode():
        for places in batches(rows, batch_size):
            batch = padded([rows[place] for place in places], device=model.device)
            responses = response_log_probs(model, batch)
            values = zip(responses.sums.double().tolist(), responses.lengths.tolist(), strict=True)
            by_place |= {place: LogProb(*value) for place, value in zip(places, values, strict=True)}
    return [by_place[place] for place in range(len(rows))]


def batches(rows: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Yield the places of the rows batch by batch, the longest first, so that those of a batch have similar lengths."""
    order = sorted(range(len(rows)), key=lambda place: -sum(map(len, rows[place])))
    for start in range(0, len(rows), batch_size):
        yield order[start : start + batch_size]


def text_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int, batch_size: int = 8
) -> list[LogProb]:
    """Return the log-probability of each plain text, without a chat template.

    ``-mean`` of a result is the negative log-likelihood per token.

    A text longer than ``window`` tokens is cut into pieces of that length; each one's first token is predicted from the
    last one of the piece before, so all but a text's first are scored, each once. A text of no more than one token has
    none: its ``tokens`` is 0.
    """
    pieces: list[Tokens] = []
    owners: list[int] = []
    for place, text in enumerate(texts):
        ids = tuple(tokenizer(text)["input_ids"])
        for start in range(0, len(ids) - 1, window - 1):
            piece = ids[start : start + window]
            pieces.append(Tokens(piece[:1], piece[1:]))
            owners.append(place)
    totals, counts = [0.0] * len(texts), [0] * len(texts)
    for owner, (total, count) in zip(owners, log_probs(model, pieces, batch_size), strict=True):
        totals[owner] += total
        counts[owner] += count
    return [LogProb(total, count) for total, count in zip(totals, counts, strict=True)]
