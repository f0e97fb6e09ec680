"""Methods of angles, norms and distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tests.methods.reference.table import Tensor, inputs, reference, spread


def arc(a: Tensor, b: Tensor, t: float, straight: Callable[[float], bool]) -> Tensor:
    na, nb = a.norm().item() or 1.0, b.norm().item() or 1.0
    c = max(-1.0, min(1.0, ((a / na) * (b / nb)).sum().item()))
    if straight(c):
        return (1 - t) * a + t * b
    theta = math.acos(c)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


@reference
def slerp(base: Tensor, models: list[Tensor], *, t: float) -> Tensor:
    return arc(base, models[0], t, lambda c: abs(c) > 0.9995)


@reference
def nuslerp(
    base: Tensor | None,
    models: list[Tensor],
    *,
    weight: Any,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    w = spread(weight, len(models))
    vectors = models if base is None else [x - base for x in models]
    out = vectors[0].clone()

    def between(u: Tensor, v: Tensor, t: float) -> Tensor:
        return arc(u, v, t, lambda c: 1 - c * c <= 1e-16)

    for n in range(1, len(vectors)):
        so_far = sum(w[: n + 1])
        t = w[n] / so_far if so_far else 1 / (n + 1)
        a, b = out.clone(), vectors[n]
        if nuslerp_flatten or a.dim() < 2:
            out = between(a, b, t)
        elif nuslerp_row_wise:
            for j in range(a.shape[1]):
                out[:, j] = between(a[:, j], b[:, j], t)
        else:
            for i in range(a.shape[0]):
                out[i] = between(a[i], b[i], t)
    return out if base is None else base + out


@reference
def multislerp(
    base: Tensor | None, models: list[Tensor], *, weight: Any, normalize_weights: bool = True, eps: float = 1e-8
) -> Tensor:
    """With the projection on the tangent space, which ours leaves out."""
    w = spread(weight, len(models))
    w = [x / sum(w) for x in w] if normalize_weights else w
    ts = models if base is None else [x - base for x in models]
    ns = [t.norm() for t in ts]
    us = [t / (n + eps) for t, n in zip(ts, ns, strict=True)]
    m = sum(x * u for x, u in zip(w, us, strict=True))
    m = m / m.norm()
    g = sum(x * (u - (u * m).sum() * m) for x, u in zip(w, us, strict=True))
    tau = g.norm() + eps
    r = m * tau.cos() + g * (tau.sin() / tau)
    out = r * sum(x * n for x, n in zip(w, ns, strict=True))
    return out if base is None else base + out


@reference
def karcher(
    base: Tensor | None, models: list[Tensor], *, weight: Any = 1.0, max_iter: int = 10, tol: float = 1e-5
) -> Tensor:
    xs = inputs(base, models)
    w = torch.tensor(spread(weight, len(xs)), dtype=torch.float64)
    w = w / w.sum()
    ns = torch.stack([x.norm() for x in xs])
    us = [x / n for x, n in zip(xs, ns, strict=True)]
    m = sum(a * u for a, u in zip(w, us, strict=True))
    m = m / m.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(m)
        for a, u in zip(w, us, strict=True):
            d = (m * u).sum().clamp(-1, 1)
            theta = d.acos()
            if theta > tol:
                step += a * theta / theta.sin() * (u - d * m)
        if step.norm() < tol:
            break
        m = step.norm().cos() * m + step.norm().sin() * step / step.norm()
        m = m / m.norm()
    return (w * ns).sum() * m


@reference
def geometric_median(
    base: Tensor | None, models: list[Tensor], *, weight: Any = 1.0, max_iter: int = 100, tol: float = 1e-9
) -> Tensor:
    """Plain Weiszfeld; for inputs whose median is none of them."""
    xs = inputs(base, models)
    w = spread(weight, len(xs))
    m = sum(a * x for a, x in zip(w, xs, strict=True)) / sum(w)
    spread_out = max((x - m).norm() for x in xs)
    for _ in range(max_iter):
        pulls = [a / (x - m).norm() for a, x in zip(w, xs, strict=True)]
        new = sum(p * x for p, x in zip(pulls, xs, strict=True)) / sum(pulls)
        done = (new - m).norm() <= tol * spread_out
        m = new
        if done:
            break
    return m


@reference
def model_stock(base: Tensor, models: list[Tensor], *, filter_wise: bool = False) -> Tensor:
    if filter_wise and base.dim() > 1:
        rows = [model_stock(base[i], [x[i] for x in models], filter_wise=False) for i in range(base.shape[0])]
        return torch.stack(rows)
    ds = [x - base for x in models]
    n = len(ds)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    c = sum(((ds[i] * ds[j]).sum() / (ds[i].norm() * ds[j].norm())).item() for i, j in pairs) / len(pairs)
    t = n * c / (1 + (n - 1) * c)
    return t * torch.stack(models).mean(0) + (1 - t) * base
