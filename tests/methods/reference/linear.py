"""Weighted sums."""

from __future__ import annotations

from typing import Any

import torch

from tests.methods.reference.table import Tensor, inputs, reference, spread


@reference
def linear(base: Tensor | None, models: list[Tensor], *, weight: Any, normalize: bool = True) -> Tensor:
    xs = inputs(base, models)
    ws = spread(weight, len(xs))
    return sum(w * x for w, x in zip(ws, xs, strict=True)) / (sum(ws) if normalize else 1)


@reference
def uniform_soup(base: Tensor | None, models: list[Tensor]) -> Tensor:
    return torch.stack(inputs(base, models)).mean(0)


@reference
def ema(base: Tensor | None, models: list[Tensor], *, decay: float = 0.9) -> Tensor:
    first, *rest = inputs(base, models)
    for x in rest:
        first = decay * first + (1 - decay) * x
    return first


@reference
def wise_ft(base: Tensor, models: list[Tensor], *, alpha: float = 0.5) -> Tensor:
    return (1 - alpha) * base + alpha * models[0]


@reference
def chat_vector(base: Tensor, models: list[Tensor], *, scale: float = 1.0) -> Tensor:
    return models[0] + scale * (models[1] - base)


@reference
def passthrough(base: None, models: list[Tensor], *, scale: float = 1.0) -> Tensor:
    return models[0] * scale


@reference
def expo(base: Tensor, models: list[Tensor], *, alpha: float) -> Tensor:
    return models[0] + alpha * (models[0] - base)
