"""Task arithmetic, TIES and breadcrumbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.methods.reference.table import REFERENCES, Tensor, doubtful, spread, top


def magnitude(deltas: list[Tensor], density: list[float]) -> list[Tensor]:
    return [
        d if r >= 1 else d * top(d.abs(), max(1, int(r * d.numel())) if r > 0 else 0)
        for d, r in zip(deltas, density, strict=True)
    ]


def inliers(deltas: list[Tensor], density: list[float], gamma: list[float]) -> list[Tensor]:
    out = []
    for d, r, g in zip(deltas, density, gamma, strict=True):
        if r >= 1:
            out.append(d)
            continue
        n = d.numel()
        keep, outliers = int(r * n), int(g * n)
        bottom = max(0, n - keep - outliers)
        # of equal ones the lowest index is the largest, so the order is descending, ranks count from its end
        order = d.abs().flatten().sort(descending=True, stable=True).indices.flip(0)
        mask = torch.zeros(n, dtype=torch.bool)
        mask[order[bottom : bottom + keep]] = True
        top(d.abs(), n - bottom), top(d.abs(), n - bottom - keep)  # notes the doubtful ones
        out.append(d * mask.view(d.shape))
    return out


def l1(before: list[Tensor], after: list[Tensor], rescale: Any, density: list[float]) -> list[Tensor]:
    if rescale == "density":
        return [a / r for a, r in zip(after, density, strict=True)]
    if rescale:
        return [a * b.abs().sum() / a.abs().sum() for b, a in zip(before, after, strict=True)]
    return after


def summed(ds: list[Tensor], w: list[float], normalize: bool) -> Tensor:
    total = sum(x * d for x, d in zip(w, ds, strict=True))
    return total / sum(w) if normalize else total


def voted(ds: list[Tensor], w: list[float], normalize: bool) -> Tensor:
    weighted = torch.stack([x * d for x, d in zip(w, ds, strict=True)])
    total = weighted.sum(0)
    doubtful.append((total.abs() <= 1e-6 * weighted.abs().sum(0)) & (total != 0))
    sign = torch.where(total >= 0, 1.0, -1.0)
    mask = weighted.sign() == sign
    merged = (weighted * mask).sum(0)
    if normalize:
        divisor = (torch.tensor(w, dtype=torch.float64).view(-1, *[1] * sign.dim()) * mask).sum(0)
        merged = merged / torch.where(divisor == 0, 1.0, divisor)
    return merged


def task_vectors(sparsifier: str, elect: bool, normalizes: bool) -> Callable[..., Tensor]:
    def merge(
        base: Tensor,
        models: list[Tensor],
        *,
        weight: Any,
        density: Any = 1.0,
        gamma: Any = 0.01,
        normalize: bool = normalizes,
        rescale: Any = False,
        trim: str = "tensor",
        int8_mask: bool = False,
        **scale: float,
    ) -> Tensor:
        ds = [x - base for x in models]
        w, r, g = (spread(value, len(ds)) for value in (weight, density, gamma))
        after = {"none": ds, "magnitude": magnitude(ds, r), "inliers": inliers(ds, r, g)}[sparsifier]
        after = l1(ds, after, rescale, r)
        merged = (voted if elect else summed)(after, w, normalize)
        return base + scale.get("lambda", 1.0) * merged

    return merge


REFERENCES["task_arithmetic"] = task_vectors("none", False, False)
REFERENCES["ties"] = task_vectors("magnitude", True, True)
REFERENCES["breadcrumbs"] = task_vectors("inliers", False, False)
REFERENCES["breadcrumbs_ties"] = task_vectors("inliers", True, False)
