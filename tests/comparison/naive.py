"""Every figure of a comparison once more: on whole tensors, in float64, with sorts and loops, from the definitions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

Tensor = torch.Tensor


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def figures(
    base: Tensor, models: list[Tensor], *, top_k: float, alphas: list[float], dtypes: list[str]
) -> dict[str, Any]:
    """Of one tensor, or of several joined to one; pairs as nested lists."""
    deltas = [(model.double() - base.double()).flatten() for model in models]
    every, count = range(len(models)), base.numel()
    masks = [largest(delta, int(top_k * count)) for delta in deltas]

    def pairs(of: Any) -> list[list[float | None]]:
        return [[of(deltas[i], deltas[j], masks[i], masks[j]) for j in every] for i in every]

    return {
        "norm": [math.sqrt(float((d * d).sum())) for d in deltas],
        "rms": [math.sqrt(float((d * d).mean())) for d in deltas],
        "changed": [float((d != 0).double().mean()) for d in deltas],
        "cosine": pairs(lambda a, b, *_: share(float(a @ b), math.sqrt(float(a @ a) * float(b @ b)))),
        "both": pairs(lambda a, b, *_: int(((a != 0) & (b != 0)).sum()) / count),
        "agree": pairs(lambda a, b, *_: share(int((a * b > 0).sum()), int(((a != 0) & (b != 0)).sum()))),
        "conflict": pairs(lambda a, b, *_: share(int((a * b < 0).sum()), int(((a != 0) & (b != 0)).sum()))),
        "overlap": pairs(lambda _a, _b, m, n: share(len(m & n), min(len(m), len(n)))),
        "split": split(torch.stack(deltas)),
        "varm": varm([float((d * d).mean()) for d in deltas]),
        "effective": [
            [[effective(model, d, alpha, getattr(torch, dtype)) for model, d in zip(models, deltas, strict=True)]
             for alpha in alphas]
            for dtype in dtypes
        ],
        "sizes": [sizes(d) for d in deltas],
    }  # fmt: skip


def largest(delta: Tensor, k: int) -> set[int]:
    """The indices of the k largest magnitudes that aren't zero; of equal ones the lowest."""
    order = sorted(range(len(delta)), key=lambda index: (-abs(float(delta[index])), index))
    return {index for index in order[:k] if delta[index] != 0}


def split(deltas: Tensor) -> float | None:
    touched = (deltas != 0).any(0)
    both_signs = (deltas > 0).any(0) & (deltas < 0).any(0)
    return share(int(both_signs.sum()), int(touched.sum()))


def varm(means: list[float]) -> list[float]:
    return [mean / sum(means) if sum(means) else 1 / len(means) for mean in means]


def effective(model: Tensor, delta: Tensor, alpha: float, dtype: torch.dtype) -> float | None:
    origin = model.double().flatten()
    out = (origin + alpha * delta).to(dtype).double()
    return share(float((out - origin) @ delta), float(delta @ delta))


def stable_rank(delta: Tensor) -> float | None:
    values = torch.linalg.svdvals(delta.double())
    return share(float((values**2).sum()), float(values[0] ** 2))


def sizes(delta: Tensor) -> list[float]:
    """Shares by the exponent of the magnitude: none, then from 2⁻⁴⁴ on."""
    bins = Counter(0 if value == 0 else math.frexp(abs(value))[1] - 1 + 45 for value in delta.tolist())
    return [bins[number] / len(delta) for number in range(49)]
