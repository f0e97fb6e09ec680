"""Log-probabilities under the logits of two models mixed, without the logits of a whole batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lite.answers.logprobs import Batch, by_sequence, head_of, rows_at_once, shape_of, states_of
from mergekit_lite.answers.packing import Packed


class Mixture(NamedTuple):
    """The logits m z + (1 − m) z_ref; m above 1 goes on beyond the model, away from the reference."""

    reference: Any  # a model as the one that is trained, without gradient
    share: float  # m, of the model's own logits z


@torch.no_grad()
def mixed_log_probs(model: Any, batch: Batch | Packed, states: Tensor, mixture: Mixture) -> Tensor:
    """Return the responses' log-probabilities (S,) float32 under softmax(m z + (1 − m) z_ref).

    Args:
        model: as ``response_log_probs`` takes it.
        batch: on its device.
        states: (R, H); the model's own, as ``response_log_probs`` returns them.
        mixture: of the model's logits with those of a reference.
    """
    heads = [(head_of(each), shape_of(each)) for each in (model, mixture.reference)]
    both = (states.detach(), states_of(mixture.reference, batch))
    rows = max(1, rows_at_once(heads[0][0]) // 2)
    found = []
    for own, theirs, targets in zip(*(torch.split(each, rows) for each in (*both, batch.targets)), strict=True):
        (z, reference) = (shape.apply(head(part)) for (head, shape), part in zip(heads, (own, theirs), strict=True))
        logits = reference.lerp(z, mixture.share)
        found.append(logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1))
    return by_sequence(torch.cat(found), batch.lengths)
