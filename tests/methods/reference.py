"""Every deterministic method once more: naive, on whole tensors, in float64, with sorts, straight from the formula.

A reference takes (base or None, list of tensors, parameters with every value given) in float64 and returns the merged
tensor. It shares no code with the package.
"""

from __future__ import annotations

import math
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


# --- linear ---------------------------------------------------------------------------------------------------------


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


# --- on the sphere --------------------------------------------------------------------------------------------------


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
    w = spread(weight, 2)
    t = w[1] / (w[0] + w[1]) if w[0] + w[1] else 0.5
    a, b = models if base is None else [x - base for x in models]
    out = torch.empty_like(a)

    def between(u: Tensor, v: Tensor) -> Tensor:
        return arc(u, v, t, lambda c: 1 - c * c <= 1e-16)

    if nuslerp_flatten or a.dim() < 2:
        out = between(a, b)
    elif nuslerp_row_wise:
        for j in range(a.shape[1]):
            out[:, j] = between(a[:, j], b[:, j])
    else:
        for i in range(a.shape[0]):
            out[i] = between(a[i], b[i])
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


# --- task vectors ---------------------------------------------------------------------------------------------------


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


# --- FuseChat -------------------------------------------------------------------------------------------------------


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


# --- element by element ---------------------------------------------------------------------------------------------


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
