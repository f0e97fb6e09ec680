"""Leading a method through its passes with the whole tensor as one block, to look at what it found."""

from __future__ import annotations

from typing import Any

import torch

from mergekit_lite.methods import TensorInfo, Weighted, method_named


def coefficients(method: str, base: torch.Tensor, models: list[torch.Tensor], **parameters: Any) -> list[float]:
    """The coefficients a method finds for its models."""
    about = method_named(method)
    info = TensorInfo("weight", tuple(base.shape), len(models), True)
    passes = about.start(info, about.resolve(parameters, len(models), True))
    block = [tensor.flatten() for tensor in (base, *models)]
    while passes.request is not None:
        passes.send(passes.request.of(block, 0).numpy())
    assert isinstance(passes.combine, Weighted)
    return list(passes.combine.coefficients)
