"""SCE and VaRM."""

from __future__ import annotations

import torch

from tests.methods.reference.table import Tensor, doubtful, reference, top


@reference
def sce(
    base: Tensor, models: list[Tensor], *, select_topk: float = 1.0, variant: str = "mergekit", int8_mask: bool = False
) -> Tensor:
    full = torch.stack([x - base for x in models])
    masked = full
    if select_topk < 1:
        variance = torch.stack(models).var(0, unbiased=False)
        variance[(torch.stack(models) == models[0]).all(0)] = 0
        masked = full * top(variance, int(select_topk * int((variance != 0).sum())))
    eta = torch.stack([(d * d).mean() for d in masked])
    eta = eta / eta.sum() if eta.sum() > 0 else torch.full_like(eta, 1 / len(models))
    used = full if variant == "fusechat" else masked
    total = used.sum(0)
    doubtful.append((total.abs() <= 1e-6 * used.abs().sum(0)) & (total != 0))
    agree = used.sign() == torch.where(total >= 0, 1.0, -1.0)
    eta = eta.view(-1, *[1] * base.dim())
    merged = (eta * used * agree).sum(0)
    if variant != "paper":
        divisor = (eta * agree).sum(0)
        merged = merged / torch.where(divisor == 0, 1.0, divisor)
    return base + merged


@reference
def varm(
    base: Tensor,
    models: list[Tensor],
    *,
    granularity: str = "tensor",
    measure: str = "square",
    temperature: float = 0.0,
) -> Tensor:
    """Of a tensor that is the whole model."""
    ds = torch.stack([x - base for x in models])
    change = ds**2 if measure == "square" else ds.abs()
    if granularity == "layer":
        change = torch.ones(len(models), *[1] * base.dim(), dtype=torch.float64)
    elif granularity != "element":
        change = change.flatten(1).mean(1).view(-1, *[1] * base.dim())
    weights = (change / temperature).softmax(0) if temperature else change / change.sum(0)
    return base + (weights.nan_to_num(0) * ds).sum(0)
