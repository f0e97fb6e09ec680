"""What decides element by element."""

from __future__ import annotations

from typing import Any

import torch

from tests.methods.reference.table import Tensor, doubtful, near, reference, spread


@reference
def nearswap(base: Tensor, models: list[Tensor], *, t: float) -> Tensor:
    w = (t / (base - models[0]).abs().clamp(min=1e-30)).clamp(0, 1)
    return w * models[0] + (1 - w) * base


@reference
def magmax(base: Tensor, models: list[Tensor], **scale: float) -> Tensor:
    ds = torch.stack([x - base for x in models])
    return base + scale.get("lambda", 1.0) * ds.gather(0, ds.abs().argmax(0, keepdim=True))[0]


@reference
def consensus(base: Tensor, models: list[Tensor], *, threshold: Any = 0.4, agree: int = 2, **scale: float) -> Tensor:
    ds = [x - base for x in models]
    total = sum(ds)
    stakes = torch.zeros_like(base)
    for d, f in zip(ds, spread(threshold, len(ds)), strict=True):
        others = f * (total - d).abs()
        doubtful.append(((d.abs() - others).abs() <= 1e-6 * others) & (others > 0))
        stakes += d.abs() >= others
    return base + scale.get("lambda", 1.0) * total * (stakes >= agree)


def changed(deltas: list[Tensor], epsilon: float) -> Tensor:
    ds = torch.stack(deltas)
    doubtful.append(((ds.abs() - epsilon).abs() <= 1e-6 * epsilon).any(0))
    return ds.abs() > epsilon


@reference
def ram(base: Tensor, models: list[Tensor], *, epsilon: float = 1e-5) -> Tensor:
    ds = [x - base for x in models]
    there = changed(ds, epsilon)
    return base + (torch.stack(ds) * there).sum(0) / there.sum(0).clamp(min=1)


@reference
def ramplus_tl(
    base: Tensor, models: list[Tensor], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Tensor:
    ds = [x - base for x in models]
    there = changed(ds, epsilon)
    count = there.sum(0)
    out = base.clone()
    for d, own in zip(ds, there, strict=True):
        unique, shared = own & (count == 1), own & (count > 1)
        rho = shared.sum().item() / max(unique.sum().item(), epsilon)
        out += unique * d * (1 + r * min(max(rho, 0), alpha)) + shared * d / count.clamp(min=1)
    return out


@reference
def arcee_fusion(base: Tensor, models: list[Tensor]) -> Tensor:
    p, q = models[0].softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    score = (models[0] - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ranked = score.flatten().sort().values
    q1, q2, q3 = (ranked[int(x * (len(ranked) - 1))].item() for x in (0.25, 0.5, 0.75))
    threshold = q2 + 1.5 * (q3 - q1)
    near(score, threshold)
    return torch.where(score >= threshold, models[0], base)
