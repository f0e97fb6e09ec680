"""Sequences laid end to end in one row of tokens, without padding; each attends to itself alone.

Responses to the same prompt may share it. The prompt x and its responses y₁, y₂ then lie as ``x y₁ y₂``, the positions
of each response go on from the prompt's, and no response sees another. So all but attention is computed once for x:

    tokens      x₀ x₁ x₂ a₀ a₁ b₀         positions    0 1 2 3 4 3
    sequences   x₀ x₁ x₂ a₀ a₁  and  x₀ x₁ x₂ b₀

Attention takes queries, keys and values out of the row sequence by sequence (``attend``), which is exact for any
attention that flash attention can do: causal, with sliding windows, with soft caps. Whether a model is computed rightly
so is tried on a few tokens (``packs``): models that carry a state from token to token, or count positions by
themselves, are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lite.answers.template import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "mergekit_lite_packed"  # the name of ``attend`` among transformers' attention functions
TRIED_WINDOW = 3  # of models with sliding windows, while they are tried on a few tokens
TRIED = (Tokens((5, 6, 7, 8), (9, 10, 11)), Tokens((5, 6, 7, 8), (12, 13, 14, 15, 16)), Tokens((17, 18), (19, 20, 21)))
WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class Packed:
    """S sequences in one row of T tokens; V ≥ T is the number of their tokens with prompts counted for each response.

    Attributes:
        input_ids: (1, T) int64.
        position_ids: (1, T) int64; of each token in its sequence.
        sizes: the number of tokens of each sequence; their sum is V.
        taken: (V,) int64; the places in the row of the sequences' tokens. None where no prompt is shared: T = V.
        given: (T,) int64; for each place in the row one of those V. None as above.
        states: (R,) int64; the places in the row that predict the scored tokens.
        targets: (R,) int64; the scored tokens.
        lengths: (S,) int64; the number of scored tokens of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    sizes: tuple[int, ...]
    taken: Tensor | None
    given: Tensor | None
    states: Tensor
    targets: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> Packed:
        """Return the same on a device."""
        tensors: dict[str, Any] = {
            name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)
        }
        return replace(self, **tensors)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's body: its attention is ``attend``, or flash attention where no prompt is shared."""
        device, longest = self.input_ids.device, max(self.sizes)
        ends = torch.tensor((0, *self.sizes), device=device).cumsum(0, dtype=torch.int32)
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "packed": self,
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def packed(groups: Sequence[Sequence[Tokens]], share: bool = True) -> Packed:
    """Lay sequences end to end. With ``share``, those of a group, which have one prompt, share it.

    The first token of a sequence is not scored where it has no prompt: nothing predicts it.
    """
    ids: list[int] = []
    positions: list[int] = []
    sizes: list[int] = []
    lengths: list[int] = []
    taken: list[range] = []
    given: list[range] = []
    states: list[range] = []
    targets: list[int] = []
    for group in groups:
        prompt = group[0].prompt
        together = share and len(group) > 1 and len(prompt) > 0
        first = len(ids)  # of the prompt's tokens
        for number, row in enumerate(group):
            if not (together and number):
                first = len(ids)
                given.append(range(sum(sizes), sum(sizes) + len(row.prompt)))
                ids += row.prompt
                positions += range(len(row.prompt))
            start, last = len(ids), first + len(row.prompt) - 1  # of the response, and the prompt's last token
            size = len(row.prompt) + len(row.response)
            given.append(range(sum(sizes) + len(row.prompt), sum(sizes) + size))
            taken += [range(first, last + 1), range(start, start + len(row.response))]
            ids += row.response
            positions += range(len(row.prompt), size)
            scored = row.response if row.prompt else row.response[1:]
            states += [range(last, last + 1) if row.prompt else range(0), range(start, len(ids) - 1)]
            targets += scored
            sizes.append(size)
            lengths.append(len(scored))
    shared = sum(sizes) > len(ids)
    return Packed(
        torch.tensor([ids]),
        torch.tensor([positions]),
        tuple(sizes),
        _places(taken) if shared else None,
        _places(given) if shared else None,
        _places(states),
        torch.tensor(targets),
        torch.tensor(lengths),
    )


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Packed,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention sequence by sequence, as an attention function of transformers.

    Args:
        module: the attention layer.
        query: (1, heads, T, width); likewise ``key`` and ``value``, which may have fewer heads.
        key: as above.
        value: as above.
        attention_mask: unused, as sequences have no padding.
        packed: says where the sequences are.
        scaling: of the products of queries and keys; the inverse root of the width by default.
        dropout: of the weights.
        sliding_window: how many tokens back a token sees, itself included; all by default.
        softcap: caps the scaled products c as cap · tanh(c / cap).

    Returns:
        (1, T, heads, width), and None.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if packed.taken is not None:
        query, key, value = (each.index_select(2, packed.taken) for each in (query, key, value))
    parts = []
    for q, k, v in zip(*(torch.split(each, list(packed.sizes), 2) for each in (query, key, value)), strict=True):
        size = q.shape[2]
        narrow = sliding_window is not None and size > sliding_window
        mask = _causal(size, sliding_window if narrow else None, q.device) if narrow or softcap is not None else None
        if softcap is None or mask is None:
            parts.append(sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, is_causal=True)[0])
            continue
        groups = q.shape[1] // k.shape[1]
        products = q @ repeat_kv(k, groups).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        products = (softcap * torch.tanh(products / softcap)).masked_fill(~mask, -torch.inf)
        weights = torch.nn.functional.dropout(products.softmax(-1, dtype=torch.float32).to(q.dtype), dropout)
        parts.append((weights @ repeat_kv(v, groups)).transpose(1, 2))
    output = torch.cat(parts, 1)
    return output if packed.given is None else output.index_select(1, packed.given), None


def packs(model: PreTrainedModel) -> bool:
    """Set the model's attention to ``attend`` if the model then computes packed sequences as it does single ones.

    It is tried on a few tokens, with windows of three tokens where the model has windows. A model that fails keeps its
    attention.
    """
    from transformers import AttentionInterface

    own = model.config._attn_implementation
    if not getattr(model, "_supports_attention_backend", False):
        return False
    AttentionInterface.register(ATTENTION, attend)
    training = model.training
    model.train(False)
    try:
        with torch.no_grad(), _narrow_windows(model):
            alone = torch.cat([_alone(model, row) for row in TRIED])
            model.set_attn_implementation(ATTENTION)
            together = _together(model, TRIED)
            changed = (Tokens(TRIED[0].prompt, tuple(id + 20 for id in TRIED[0].response)), *TRIED[1:])
            others = slice(len(TRIED[0].response), None)
            apart = _same(_together(model, changed)[others], together[others], 1e-4)
        good = apart and _same(together, alone, 1e-4 if alone.dtype == torch.float32 else 3e-2)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError):  # it can't be called so
        good = False
    model.train(training)
    if not good:
        model.set_attn_implementation(own)
    return good


def _alone(model: PreTrainedModel, row: Tokens) -> Tensor:
    """Return the hidden states (n, H) that predict a response, computed without packing."""
    ids = torch.tensor([[*row.prompt, *row.response]], device=model.device)
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False)[0]
    return hidden[0, len(row.prompt) - 1 : -1]


def _together(model: PreTrainedModel, rows: Sequence[Tokens]) -> Tensor:
    """Return the hidden states (n, H) that predict all responses, packed; the first two share their prompt."""
    batch = packed([rows[:2], rows[2:]]).to(model.device)
    hidden: Tensor = model.base_model(**batch.inputs, use_cache=False)[0]
    return hidden[0, batch.states]


def _same(first: Tensor, second: Tensor, tolerance: float) -> bool:
    return torch.allclose(first, second, rtol=0, atol=tolerance * second.abs().max().item())


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Give every window of the model ``TRIED_WINDOW`` tokens meanwhile, so that few tokens show what windows do."""
    owners = [model.config.get_text_config(), *model.modules()]
    found = [
        (owner, name, value)
        for owner in owners
        for name in WINDOWS
        if isinstance(value := getattr(owner, name, None), int) and not isinstance(value, bool)
    ]
    for owner, name, _ in found:
        setattr(owner, name, TRIED_WINDOW)
    try:
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)


def _causal(size: int, window: int | None, device: torch.device) -> Tensor:
    """Return (1, 1, size, size) bool: whether a token sees another one."""
    back = torch.arange(size, device=device)[:, None] - torch.arange(size, device=device)
    return ((back >= 0) & (back < (window or size)))[None, None]


def _places(ranges: Sequence[range]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(ranges)), dtype=torch.int64)
