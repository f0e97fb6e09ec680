"""Leading a method through its statistics with the whole tensor as one block, to look at what it found."""

from __future__ import annotations

from typing import Any

import torch

from mergekit_lite.methods import method_named
from mergekit_lite.methods.contract import TensorInfo
from mergekit_lite.methods.tensor_merge import TensorMerge
from mergekit_lite.ops.torch_ops import figures_of


def coefficients(method: str, base: torch.Tensor, models: list[torch.Tensor], **parameters: Any) -> list[float]:
    """The coefficients a method finds for its models."""
    about = method_named(method)
    info = TensorInfo("weight", tuple(base.shape), len(models), True)
    merge = TensorMerge(about, info, about.resolve(parameters, len(models), True), ["float32"])
    block = [tensor.flatten() for tensor in (base, *models)]
    while merge.request is not None:
        merge.send(figures_of(merge.request.of, block, 0).numpy())
    assert len(merge.coefficients) == len(models)
    return list(merge.coefficients)
