"""Log-probabilities of responses, without the logits of a whole batch.

The model's body computes hidden states; its head computes the logits of a chunk of response positions at a time, from
which the targets' log-probabilities are taken in float32. Chunks are computed again in the backward pass, but for the
last one, which is still there when that pass begins. At a vocabulary of 128,000 a batch of 2 × 3 sequences of 2048
tokens would need 6.3 GB of float32 logits for the forward pass alone; a chunk is 256 MB in float32, and never more than
a sixteenth of it is in float32 where the model computes in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mergekit_lite.answers.packing import Packed
from mergekit_lite.answers.template import Tokens
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 1 << 26  # logits in memory at once
PARTS = 16  # of a chunk, converted to float32 one after the other
CHECKED_TOKENS = 8


@dataclass(frozen=True)
class Batch:
    """Token sequences, padded on the right."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64; 0 at padding
    responses: Tensor  # (B, T) bool; True at the tokens of the responses

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the model's body."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def states(self) -> Tensor:
        """(R,) int64; the places in the flattened batch that predict the scored tokens."""
        return self._scored.flatten().nonzero()[:, 0]

    @property
    def targets(self) -> Tensor:
        """(R,) int64; the scored tokens."""
        return self.input_ids.flatten()[self.states + 1]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64; the number of scored tokens of each sequence."""
        return self._scored.sum(1)

    @property
    def _scored(self) -> Tensor:
        """(B, T) bool; True where the next token is scored: never the first one, which nothing predicts."""
        return torch.nn.functional.pad(self.responses[:, 1:], (0, 1))


@dataclass(frozen=True)
class ResponseLogProbs:
    """The log-probabilities of responses, as objectives need them.

    Attributes:
        sums: (B,) float32; Σ_t log π(y_t | x, y_<t).
        lengths: (B,) int64; the number of tokens, the end of the turn included.
        squares: (B,) float32, no gradient; mean_t log Σ_v π(v | x, y_<t)². None where ``squares`` is False.
        tokens: (R,) float32; log π(y_t | x, y_<t), of all responses in a row.
        states: (R, H); the hidden states that the head predicts them from.
    """

    sums: Tensor
    lengths: Tensor
    squares: Tensor | None
    tokens: Tensor
    states: Tensor


def padded(rows: Sequence[Tokens], pad: int = 0, device: torch.device | str = "cpu") -> Batch:
    """Put prompts and responses into one batch. No position that counts attends to the padding, so any id serves."""
    longest = max(len(row.prompt) + len(row.response) for row in rows)
    input_ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    responses = torch.zeros(input_ids.shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        end = len(row.prompt) + len(row.response)
        input_ids[place, :end] = torch.tensor([*row.prompt, *row.response])
        attention_mask[place, :end] = 1
        responses[place, len(row.prompt) : end] = True
    return Batch(input_ids.to(device), attention_mask.to(device), responses.to(device))


def response_log_probs(model: PreTrainedModel, batch: Batch | Packed, squares: bool = False) -> ResponseLogProbs:
    """Compute the log-probabilities of the responses under a causal language model.

    ``sums`` and ``tokens`` are differentiable. The first token of a sequence is never scored, for nothing predicts it.

    Args:
        model: with a head that ``check_head`` accepts; for a packed batch, one that ``packs``.
        batch: on the model's device.
        squares: whether to compute WPO's mean_t log Σ_v π² too.
    """
    states, targets, lengths = states_of(model, batch), batch.targets, batch.lengths
    shape, head = shape_of(model), head_of(model)
    rows = rows_at_once(head)
    # The last chunk, which isn't computed again, is a full one.
    counts = [each for each in (len(targets) % rows, *[rows] * (len(targets) // rows)) if each] or [0]
    parts = list(zip(torch.split(states, counts), torch.split(targets, counts), strict=True))
    chunks = [
        _chunk(head, *part, shape, squares, again=place < len(parts)) for place, part in enumerate(parts, start=1)
    ]
    tokens = torch.cat([logps for logps, _ in chunks])
    means = by_sequence(torch.cat([logs for _, logs in chunks]), lengths) / lengths if squares else None
    return ResponseLogProbs(by_sequence(tokens, lengths), lengths, means, tokens, states)


def states_of(model: PreTrainedModel, batch: Batch | Packed) -> Tensor:
    """Return the hidden states (R, H) that predict the scored tokens."""
    hidden: Tensor = model.base_model(**batch.inputs, use_cache=False)[0].flatten(0, 1)
    return hidden[batch.states]


def rows_at_once(head: Any) -> int:
    """Return how many positions' logits may be in memory at once."""
    # ZeRO-3 keeps a weight's shape apart while it is partitioned.
    return max(1, LOGITS_AT_ONCE // int(getattr(head.weight, "ds_shape", head.weight.shape)[0]))


def head_of(model: PreTrainedModel) -> Any:
    """Return the linear layer from hidden states to the vocabulary."""
    return model.get_output_embeddings()  # type: ignore[no-untyped-call]


class Shape(NamedTuple):
    """The function of the head's output x that gives logits: ``cap · tanh(scale · x / cap)``, or ``scale · x``."""

    scale: float
    cap: float | None

    def apply(self, head: Tensor) -> Tensor:
        """Return the logits in float32, or in float64 if the head's output is."""
        logits = head if head.dtype is torch.float64 else head.float()
        if self.scale != 1:
            logits = logits * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of ``apply``, given its result."""
        return self.scale * (1 - (logits / self.cap) ** 2) if self.cap else self.scale


def shape_of(model: PreTrainedModel) -> Shape:
    """Read the configuration: Cohere multiplies its logits, Granite divides them, Gemma 2 caps them."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    return Shape(
        scale / (getattr(config, "logits_scaling", None) or 1.0), getattr(config, "final_logit_softcapping", None)
    )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare logits computed as above with the model's own on a few tokens.

    Raises:
        UsageError: the model computes its logits in another way.
    """
    head = head_of(model)
    if head is None or getattr(head, "weight", None) is None:
        raise UsageError(f"{type(model).__name__} has no language model head. Train a causal language model.")
    ids = torch.arange(1, 1 + CHECKED_TOKENS, device=head.weight.device)[None]
    training = model.training
    model.train(False)
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = shape_of(model).apply(head(model.base_model(input_ids=ids, use_cache=False)[0]))
    model.train(training)
    if not own.isfinite().all():
        raise UsageError(
            f"The logits of {model.name_or_path or type(model).__name__} are NaN or infinite. Its weights are damaged: "
            "mergekit-lite inspect shows which."
        )
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * own.abs().max().item()):
        raise UsageError(
            f"{type(model).__name__} makes its logits in a way that this package doesn't know (not a linear head, "
            f"a scale and a soft cap): log-probabilities would be wrong. Use another model."
        )


def by_sequence(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum the scored tokens' values (R,) over each sequence, giving (S,), always in the same order."""
    places = torch.arange(int(lengths.max()), device=values.device) < lengths[:, None]
    return torch.zeros(places.shape, dtype=values.dtype, device=values.device).masked_scatter(places, values).sum(1)


def _chunk(
    head: Any, states: Tensor, targets: Tensor, shape: Shape, squares: bool, again: bool
) -> tuple[Tensor, Tensor]:
    """Return ``_TargetLogProbs`` of states (R, H); ``again`` computes the logits anew for the backward pass.

    That pass goes from the last chunk to the first, so where it begins, the last is in memory in either case.
    """

    def run(states: Tensor, targets: Tensor) -> Any:
        return _TargetLogProbs.apply(head(states), targets, shape, squares)  # type: ignore[no-untyped-call]

    if not (again and torch.is_grad_enabled()):
        logps, logs = run(states, targets)
    else:
        logps, logs = checkpoint(run, states, targets, use_reentrant=False)
    return logps, logs


class _TargetLogProbs(torch.autograd.Function):
    """From a head's output (R, V) and targets (R,) to log p_target and log Σ_v p_v², both (R,) float32.

    The gradient, one at the target minus softmax, overwrites the head's output, which nothing else needs by then.
    ``log Σ p²`` has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, targets: Tensor, shape: Shape, squares: bool) -> tuple[Tensor, Tensor]:
        chosen, totals, logs = [], [], []
        for part, target in zip(output.chunk(PARTS), targets.chunk(PARTS), strict=True):
            logits = shape.apply(part)
            chosen.append(logits.gather(1, target[:, None])[:, 0])
            totals.append(logits.logsumexp(1))
            logs.append((2 * logits).logsumexp(1) if squares else torch.zeros_like(totals[-1]))
        total = torch.cat(totals)
        ctx.save_for_backward(output, targets, total)
        ctx.shape = shape
        log_squares = torch.cat(logs) - 2 * total
        ctx.mark_non_differentiable(log_squares)
        return torch.cat(chosen) - total, log_squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        output, targets, total = (tensor.detach() for tensor in ctx.saved_tensors)
        for part, target, log_z, weight in zip(
            *(tensor.chunk(PARTS) for tensor in (output, targets, total, gradient)), strict=True
        ):
            logits = ctx.shape.apply(part)
            curve = ctx.shape.slope(logits)  # before the logits, which may be the part itself, are overwritten
            slope = logits.sub_(log_z[:, None]).exp_().mul_(-weight[:, None])
            slope.scatter_add_(1, target[:, None], weight[:, None])
            part.copy_(slope if isinstance(curve, float) and curve == 1 else slope.mul_(curve))
        return output, None, None, None
