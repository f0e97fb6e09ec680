"""Methods along a training run."""

from __future__ import annotations

import numpy as np
import torch

from tests.methods.reference.table import Tensor, reference


@reference
def relex(base: Tensor, models: list[Tensor], *, step: list[float], to_step: float) -> Tensor:
    """By the singular vectors of all deltas below each other, and numpy's fit of a line."""
    below = np.stack([(model - base).numpy().ravel() for model in models])
    _, _, directions = np.linalg.svd(below, full_matrices=False)
    line = np.polynomial.Polynomial.fit(step, below @ directions[0], 1)
    return base + torch.from_numpy(line(to_step) * directions[0]).view(base.shape)
