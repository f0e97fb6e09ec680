"""Answers in the making: several models read them, their logits are mixed, and each gets its next token.

At each step the logits of the model that is not written yet are taken to be

    base + (1 + alpha)·(aligned − sft)        base is sft, or another model of the same vocabulary

which is ExPO's extrapolation, of logits instead of weights (emulated fine-tuning: Mitchell et al. 2023, arXiv
2310.12962; proxy tuning: Liu et al. 2024, arXiv 2401.08565). As a sum it has one weight a model, and a model of weight
0 has no part in it. So alpha 0 is the aligned model to the token, and −1 the base.

All drafts begin with one prompt and grow by a token at a time, so a batch needs no padding and no positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.errors import RunError


class Reader:
    """A model that reads sequences of one length, and keeps the keys and values of what it has read."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.width = int(model.config.get_text_config().vocab_size)
        kept = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if kept else {}
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.cache: Any = None
        self.read = 0  # how many tokens of each sequence the cache has

    def logits(self, sequences: Tensor) -> Tensor:
        """Return the logits (rows, width) in float32 that follow the sequences (rows, length).

        They are those of the last call, in its order or in that of ``keep``, with some tokens more.
        """
        # A token that this model doesn't have is read as its last one; its logits don't count where that happens.
        unread = sequences[:, self.read :].clamp(max=self.width - 1)
        output = self.model(
            input_ids=unread.to(self.model.device), past_key_values=self.cache, use_cache=True, **self.options
        )
        self.cache = getattr(output, "past_key_values", None)  # without one, everything is read again
        self.read = 0 if self.cache is None else sequences.shape[1]
        logits: Tensor = output.logits[:, -1, : self.width].float().cpu()
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (numbers, repeated where a row is to go on several times)."""
        if self.cache is not None:
            self.cache.reorder_cache(rows.to(self.model.device))


@dataclass(frozen=True)
class Rules:
    """How a next token is chosen and an answer ends."""

    sampling: Sampling  # temperature 0 takes the likeliest token
    ends: frozenset[int]  # tokens that end an answer
    seed: int  # of the draws to this prompt


class Drafts:
    """Answers to one prompt, each with an alpha of its own, or several with the same.

    Attributes:
        tokens: (drafts, length) int64; after the end of a draft zeros.
        lengths: (drafts,) how many of them are the draft's, its end included.
        ended: (drafts,) whether the draft has an end.
        log_probs: (models, drafts) float64, log π(draft | prompt) under each model by itself, at temperature 1; minus
            infinity where a model doesn't have a token.
        alphas: (drafts,) which column of ``weights`` a draft has.
        numbers: (drafts,) which draw a draft takes at each step. Drafts of different alphas with the same number share
            their draws, so that they differ by alpha and not by luck.
    """

    def __init__(
        self, readers: Sequence[Reader], weights: Tensor, prompt: Sequence[int], rules: Rules, each: int = 1
    ) -> None:
        """Begin ``each`` empty drafts of every alpha.

        Args:
            readers: the models.
            weights: (models, alphas) the factor of each model's logits.
            prompt: its tokens.
            rules: how tokens are chosen.
            each: drafts of each alpha.
        """
        count = weights.shape[1]
        self.readers, self.weights, self.rules, self.each = readers, weights, rules, each
        self.prompt = torch.tensor(prompt)[None]
        self.alphas = torch.arange(count).repeat_interleave(each)
        self.numbers = torch.arange(each).repeat(count)
        self.tokens = torch.zeros((count * each, 0), dtype=torch.long)
        self.lengths = torch.zeros(count * each, dtype=torch.long)
        self.ended = torch.zeros(count * each, dtype=torch.bool)
        self.log_probs = torch.zeros((len(readers), count * each), dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(rules.seed)
        self._cached = torch.zeros(1, dtype=torch.long)  # the draft of each row of the caches
        self._processors = _processors(rules.sampling)
        self._ends = torch.tensor(sorted(rules.ends))
        for reader in readers:
            reader.forget()

    def grow(self) -> bool:
        """Add a token to each draft that hasn't ended; return whether there was one.

        Raises:
            RunError: mixed logits are not numbers.
        """
        live = (~self.ended).nonzero()[:, 0]
        if not len(live):
            return False
        logits = self._logits(live)
        chosen = self._draw(live, self._mixed(logits, live))
        for place, own in enumerate(logits):
            self.log_probs[place, live] += _log_prob(own, chosen).double()
        column = torch.zeros(len(self.tokens), dtype=torch.long)
        column[live] = chosen
        self.tokens = torch.cat([self.tokens, column[:, None]], dim=1)
        self.lengths[live] += 1
        self.ended[live] = torch.isin(chosen, self._ends)
        return True

    def select(self, drafts: Sequence[int], numbers: Sequence[int]) -> None:
        """Go on with these drafts, repeated or not, and with these draws."""
        rows = torch.tensor(drafts, dtype=torch.long)
        self.tokens, self.lengths, self.ended = self.tokens[rows], self.lengths[rows], self.ended[rows]
        self.alphas, self.log_probs = self.alphas[rows], self.log_probs[:, rows]
        self.numbers = torch.tensor(numbers, dtype=torch.long)
        place = {int(draft): row for row, draft in enumerate(self._cached)}
        live = (~self.ended).nonzero()[:, 0]
        self._keep([place[drafts[new]] for new in live.tolist()], live)

    def answer(self, draft: int) -> list[int]:
        """Return the tokens of a draft, its end included."""
        tokens: list[int] = self.tokens[draft, : int(self.lengths[draft])].tolist()
        return tokens

    def _logits(self, live: Tensor) -> list[Tensor]:
        if self.tokens.shape[1] == 0:  # all begin alike: the prompt is read once
            logits = [reader.logits(self.prompt) for reader in self.readers]
            self._keep([0] * len(live), live)
            return [own.expand(len(live), -1) for own in logits]
        if len(live) < len(self._cached):
            place = {int(draft): row for row, draft in enumerate(self._cached)}
            self._keep([place[draft] for draft in live.tolist()], live)
        sequences = torch.cat([self.prompt.expand(len(live), -1), self.tokens[live]], dim=1)
        return [reader.logits(sequences) for reader in self.readers]

    def _keep(self, rows: list[int], drafts: Tensor) -> None:
        self._cached = drafts
        if rows:
            for reader in self.readers:
                reader.keep(torch.tensor(rows))

    def _mixed(self, logits: Sequence[Tensor], live: Tensor) -> Tensor:
        """Return the weighted sum (drafts, widest); what is impossible to some model of the sum is impossible."""
        widest = max(own.shape[1] for own in logits)
        total = torch.zeros((len(live), widest))
        impossible = torch.zeros_like(total, dtype=torch.bool)
        for own, weights in zip(logits, self.weights, strict=True):
            weight = weights[self.alphas[live]][:, None]
            total[:, : own.shape[1]] += torch.where(weight == 0, 0.0, weight * own)
            impossible[:, : own.shape[1]] |= (weight != 0) & (own == -torch.inf)
            impossible[:, own.shape[1] :] |= weight != 0  # tokens that it doesn't have
        total.masked_fill_(impossible, -torch.inf)
        if total.isnan().any():
            raise RunError("The mixed logits are not numbers. Take --dtype float32, or smaller alphas.")
        return total

    def _draw(self, live: Tensor, logits: Tensor) -> Tensor:
        sequences = torch.cat([self.prompt.expand(len(live), -1), self.tokens[live]], dim=1)
        scores: Tensor = self._processors(sequences, logits)
        if self.rules.sampling.temperature > 0:
            # The largest of log p + Gumbel noise is a draw from p.
            waits = torch.empty((self.each, scores.shape[1])).exponential_(generator=self._generator)
            scores = scores - waits.log()[self.numbers[live]]
        return scores.argmax(dim=1)


def _log_prob(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return log p (rows,) of the chosen tokens; minus infinity of those beyond the logits."""
    known = chosen < logits.shape[1]
    own = logits.log_softmax(dim=1).gather(1, chosen.clamp(max=logits.shape[1] - 1)[:, None])[:, 0]
    return own.masked_fill(~known, -torch.inf)


def _processors(sampling: Sampling) -> Any:
    """Return transformers' own functions of (sequences, logits) for what the sampling sets."""
    from transformers.generation import logits_process

    made: Any = logits_process  # not all of it has types
    processors = made.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(made.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        processors.append(made.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(made.TopPLogitsWarper(sampling.top_p))
    return processors
