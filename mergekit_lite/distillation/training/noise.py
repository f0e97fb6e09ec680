"""Noise on the embeddings of tokens while SFT trains: NEFTune (2310.05914) and SymNoise (2312.01523)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.answers.logprobs import Batch
from mergekit_lite.answers.packing import Packed
from mergekit_lite.distillation.recipe.schema import Noise


def inverse_lengths(batch: Batch | Packed) -> Tensor:
    """Return 1 / L for each place of a batch (B, T), L the length of the sequence that lies there; 0 at padding.

    As in NEFTune's released code, padding neither counts nor gets noise. No two sequences may share a prompt.
    """
    if isinstance(batch, Batch):
        lengths = batch.attention_mask.sum(1, keepdim=True)
        return batch.attention_mask / lengths
    sizes = torch.tensor(batch.sizes, device=batch.input_ids.device)
    return (1 / sizes).repeat_interleave(sizes)[None]


def drawn(like: Tensor, inverse: Tensor, noise: Noise, rows: int) -> Tensor:
    """Return noise for embeddings (B, T, d), α / √(L d) times numbers that are drawn for each of them.

    They are of [−1, 1] evenly for NEFTune, and −1 or 1 for SymNoise, whose second half of the batch is the first half
    again and gets the opposite noise. The halves lie one after the other along ``rows``, 0 or 1.
    """
    scale = noise.alpha * (inverse.to(like.dtype) / like.shape[-1]).sqrt()[..., None]
    if noise.kind == "neftune":
        return torch.empty_like(like).uniform_(-1, 1) * scale
    half = torch.empty_like(like.chunk(2, rows)[0]).bernoulli_(0.5) * 2 - 1
    return torch.cat([half, -half], rows) * scale


@contextmanager
def noisy(model: Any, batch: Batch | Packed, noise: Noise) -> Iterator[None]:
    """Add noise to what the model's embedding returns for a batch."""
    inverse, rows = inverse_lengths(batch), 0 if isinstance(batch, Batch) else 1

    def add(_layer: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output + drawn(output, inverse, noise, rows)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
