"""Methods along a training run."""

from __future__ import annotations

import numpy as np
import torch

from tests.methods.reference.table import Tensor, reference, spread


@reference
def relex(base: Tensor, models: list[Tensor], *, step: list[float], to_step: float) -> Tensor:
    """By the singular vectors of all deltas below each other, and numpy's fit of a line."""
    below = np.stack([(model - base).numpy().ravel() for model in models])
    _, _, directions = np.linalg.svd(below, full_matrices=False)
    line = np.polynomial.Polynomial.fit(step, below @ directions[0], 1)
    return base + torch.from_numpy(line(to_step) * directions[0]).view(base.shape)


@reference
def schedule_average(
    base: None, models: list[Tensor], *, schedule: str = "uniform", weight: list[float] | float = 1.0
) -> Tensor:
    """By the decay of the learning rate: what each stretch of training added, times the rate it would have had."""
    below = np.stack([model.numpy() for model in models])
    count = len(models)
    times = np.arange(1, count) / count
    if schedule == "linear":
        parts = np.arange(count) + 1.0
    else:
        rates = {"uniform": 1 - times, "cosine": np.cos(np.pi * times / 2) ** 2, "inverse-sqrt": 1 - times**0.5}
        # the first checkpoint, and what each stretch of training added, as the learning rate would have had it
        added = np.eye(count) - np.eye(count, k=-1)
        parts = np.array([1.0, *rates[schedule]]) @ added
    parts = parts * np.asarray(spread(weight, count))
    return torch.from_numpy(np.tensordot(parts / parts.sum(), below, 1))
