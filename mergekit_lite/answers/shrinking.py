"""Batches that shrink while they are generated: answers that have ended leave the batch.

``generate`` computes every row of a batch until its last one ends. On a CPU a row costs as much as another, whether it
has ended or not, and half of the rows may have ended at half of the longest one. So a batch is generated in pieces of
some tokens, and between these only the rows that go on are kept, with their part of the cache.

Random numbers are still drawn for all rows. So each row gets those that it would get in a whole batch, and says the
same; and answers of two models to the same prompts stay as alike as the models are, whichever row ends first.
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
    draw = Draw(model.generation_config, len(ids))
    last = torch.tensor(sorted(ends), dtype=torch.long)
    cache = None
    while len(draw.rows) and (left := most - (ids.shape[1] - start)) > 0:
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=min(piece, left),
            past_key_values=cache,
            return_dict_in_generate=True,
            **draw.settings,
        )
        for row, tokens in zip(draw.rows.tolist(), made.sequences[:, start:].tolist(), strict=True):
            answers[row] = tokens
        goes_on = ~torch.isin(made.sequences[:, ids.shape[1] :], last).any(dim=1)
        mask = torch.nn.functional.pad(mask, (0, made.sequences.shape[1] - ids.shape[1]), value=1)
        ids, cache = made.sequences, made.past_key_values
        if not goes_on.all():
            kept = goes_on.nonzero()[:, 0]
            draw.rows, ids, mask = draw.rows[kept], ids[kept], mask[kept]
            cache.batch_select_indices(kept)
    return answers


class Draw:
    """Makes the highest logit that of a token drawn at random: log p − log q is highest there, with q ~ Exp(1).

    That is what ``torch.multinomial`` does, with the same numbers, but for rows that have left their batch too.
    """

    def __init__(self, config: Any, rows: int):
        """Take how tokens are drawn from a generation config."""
        import torch

        self.rows = torch.arange(rows)  # those that go on, by their places in the whole batch
        self.count = rows
        self.warpers = warpers(config) if config.do_sample else []
        self.settings: dict[str, Any] = {}  # of ``generate``, which takes the highest logit
        if config.do_sample:
            neutral = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}  # and ignored
            self.settings = {"do_sample": False, "logits_processor": [self], **neutral}

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return logits with the noise by which the highest one is drawn, [rows that go on, vocabulary]."""
        import torch

        for warper in self.warpers:
            scores = warper(ids, scores)
        noise = torch.empty((self.count, scores.shape[1])).exponential_()
        return scores - noise[self.rows].log_()


def warpers(config: Any) -> list[Any]:
    """Return what changes the logits before a token is drawn, in the order of transformers."""
    from transformers.generation import logits_process as process

    made: list[Any] = []
    if config.temperature not in (None, 1):
        made.append(process.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        made.append(process.TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        made.append(process.TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        made.append(process.MinPLogitsWarper(config.min_p))
    return made
