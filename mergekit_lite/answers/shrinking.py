"""Batches that shrink while they are generated: answers that have ended leave the batch.

``generate`` computes every row of a batch until its last one ends. On a CPU a row costs as much as another, whether it
has ended or not, and half of the rows may have ended at half of the longest one. So a batch is generated in pieces of
some tokens, and between these only the rows that go on are kept, with their part of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PIECE = 16  # tokens


def can_shrink(model: Any) -> bool:
    """Return whether a batch of this model gains by shrinking, and may.

    It gains on a CPU, and may if all that the model keeps is plain keys and values of each row: no states, no windows.
    """
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if model.device.type != "cpu" or model.config.is_encoder_decoder:
        return False
    one = torch.zeros((1, 2), dtype=torch.long)
    with torch.inference_mode():
        cache = model(input_ids=one, attention_mask=torch.ones_like(one), use_cache=True).get("past_key_values")
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def generate(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, most: int, ends: frozenset[int], piece: int = PIECE
) -> list[list[int]]:
    """Return what follows each prompt, up to ``most`` tokens or to its end and maybe beyond.

    Args:
        model: whose generation config says how tokens are drawn.
        ids: tokens of the prompts, padded at the left, [rows, tokens].
        mask: 1 at the prompts' own tokens, as ``ids``.
        most: tokens of an answer.
        ends: tokens that end an answer.
        piece: tokens after which rows that have ended leave.
    """
    import torch

    start = ids.shape[1]
    answers: list[list[int]] = [[] for _ in ids]
    rows = torch.arange(len(ids))  # those that go on, by their places among the prompts
    last = torch.tensor(sorted(ends), dtype=torch.long)
    cache = None
    while len(rows) and (left := most - (ids.shape[1] - start)) > 0:
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=min(piece, left),
            past_key_values=cache,
            return_dict_in_generate=True,
        )
        for row, tokens in zip(rows.tolist(), made.sequences[:, start:].tolist(), strict=True):
            answers[row] = tokens
        goes_on = ~torch.isin(made.sequences[:, ids.shape[1] :], last).any(dim=1)
        mask = torch.nn.functional.pad(mask, (0, made.sequences.shape[1] - ids.shape[1]), value=1)
        ids, cache = made.sequences, made.past_key_values
        if not goes_on.all():
            kept = goes_on.nonzero()[:, 0]
            rows, ids, mask = rows[kept], ids[kept], mask[kept]
            cache.batch_select_indices(kept)
    return answers
