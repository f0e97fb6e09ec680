"""The references by name, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
REFERENCES: dict[str, Callable[..., Tensor]] = {}
doubtful: list[Tensor] = []  # masks of the elements a hair from a selection threshold in the last call


def reference(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    REFERENCES[function.__name__] = function
    return function


def inputs(base: Tensor | None, models: list[Tensor]) -> list[Tensor]:
    return models if base is None else [base, *models]


def spread(value: Any, count: int) -> list[float]:
    return [float(v) for v in value] if isinstance(value, list) else [float(value)] * count


def near(quantity: Tensor, threshold: float) -> None:
    """Note the elements a hair from a threshold, but for exact ties: both sides settle those by the index."""
    hair = (quantity - threshold).abs() <= 1e-6 * abs(threshold)
    if quantity[hair].unique().numel() > 1:
        doubtful.append(hair)


def top(quantity: Tensor, k: int) -> Tensor:
    """Whether an element is among the k largest; of equal ones the lowest index is."""
    order = quantity.flatten().sort(descending=True, stable=True).indices
    kept = torch.zeros(quantity.numel(), dtype=torch.bool)
    kept[order[:k]] = True
    kept = kept.view(quantity.shape)
    if 0 < k < quantity.numel():
        near(quantity, quantity[kept].min().item())
    return kept
