"""Means along the sphere: slerp, nuslerp, multislerp, karcher; and the geometric median, found in the same small space.

Every result is Σ c·x, and the coefficients follow from the inputs' inner products: those are summed in float64, and
iterations run in them, not over the elements.

Papers: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; Karcher 1977 (as used by mergekit);
Weiszfeld 1937, with Vardi & Zhang, PNAS 2000, for points that are hit.

Where mergekit differs: it computes nuslerp, multislerp and karcher in the models' own dtype. Its slerp takes the
straight line when |cos θ| > 0.9995, as here. Its multislerp projects on the tangent space at the normalised weighted
mean m, where the weighted tangents sum to zero (Σ w·(u − (u·m)·m) = |M|·m − |M|·m): what it computes is the normalised
mean M/|M| at the mean length, and that is what is computed here. ``karcher`` is the mean on the sphere.
"""

from __future__ import annotations

from typing import TypeAlias

from mergekit_lite.deferred import torch
from mergekit_lite.errors import UsageError
from mergekit_lite.methods.linear import shares
from mergekit_lite.methods.parameters import PerInput, PerModel
from mergekit_lite.methods.passes import Block, Combine, Steps, Subject, Sums, deltas, sum_of_deltas, sum_of_inputs
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.statistics import gram

STRAIGHT = 1 - 0.9995**2  # of sin² θ, up to which slerp takes the straight line
PARALLEL = 1e-16  # up to which nuslerp does

Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"


def _on_arc(t: float, products: torch.Tensor, straight: float) -> Pair:
    """Coefficients of a and b at ``t`` of the arc between them.

    Args:
        t: 0 is a, 1 is b.
        products: ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩, float64 of shape (3, …).
        straight: where sin² of the angle is not above this, the straight line.
    """
    lengths = (products[0] * products[1]).sqrt()
    cosine = torch.where(lengths > 0, products[2] / lengths, torch.zeros_like(lengths)).clamp(-1, 1)
    angle = cosine.acos()
    line = 1 - cosine * cosine <= straight
    sine = angle.sin().masked_fill(line, 1.0)
    a = torch.where(line, 1 - t, ((1 - t) * angle).sin() / sine)
    b = torch.where(line, t, (t * angle).sin() / sine)
    return a, b


def _products(vectors: Block, axis: int) -> torch.Tensor:
    """⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩ along one axis of two matrices: float64 of shape (3, other axis)."""
    a, b = (vector.double() for vector in vectors)
    return torch.stack([(x * y).sum(axis) for x, y in ((a, a), (b, b), (a, b))])


@method(models=(1, 1), formula="(sin((1−t)θ)·base + sin(tθ)·x) / sin θ", source="Shoemake 1985")
def slerp(subject: Subject, *, t: float) -> Steps:
    """Spherical interpolation between the base and one model, each tensor as one vector.

    Args:
        subject: the tensor.
        t: 0 is the base, 1 the model; beyond them it goes on along the arc.
    """
    products = yield from gram(from_base=False)
    a, b = _on_arc(t, products[[0, 1, 0], [0, 1, 1]], STRAIGHT)
    coefficients = (a.item(), b.item())
    return sum_of_inputs(coefficients)


def _nuslerp_rows(shape: tuple[int, ...], *, nuslerp_flatten: bool, nuslerp_row_wise: bool, **_: object) -> int:
    if nuslerp_flatten or not shape:
        return 0
    return torch.Size(shape[1:]).numel() if nuslerp_row_wise else shape[-1]


@method(
    base="optional",
    models=(2, 2),
    rows=_nuslerp_rows,
    formula="base + slerp(x₁ − base, x₂ − base, w₂/(w₁+w₂))",
    source="mergekit",
)
def nuslerp(
    subject: Subject, *, weight: PerModel, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Steps:
    """Slerp between two models, or between what they add to a base, at the place their weights give.

    Args:
        subject: the tensor.
        weight: of each model; only their ratio counts. Weights that sum to zero mean the middle.
        nuslerp_flatten: the whole tensor is one vector.
        nuslerp_row_wise: where not: vectors run along the first axis instead of the last (sic, as in mergekit).
    """
    t = weight[1] / sum(weight) if sum(weight) != 0 else 0.5

    def vectors(block: Block) -> Block:
        return deltas(block) if subject.has_base else block

    def at(block: Block, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        first, second = vectors(block)
        merged = first * a.to(first) + second * b.to(first)
        return merged.add_(block[0]) if subject.has_base else merged

    if nuslerp_flatten or not subject.shape:
        products = yield from gram(subject.has_base)
        whole = _on_arc(t, products[[0, 1, 0], [0, 1, 1]], PARALLEL)
        return lambda block, _: at(block, *whole)
    if nuslerp_row_wise:
        columns = _on_arc(t, (yield Sums(lambda block, _: _products(vectors(block), 0))), PARALLEL)
        return lambda block, _: at(block, *columns)

    def by_rows(block: Block, _: int) -> torch.Tensor:
        a, b = _on_arc(t, _products(vectors(block), 1), PARALLEL)
        return at(block, a[:, None], b[:, None])

    return by_rows


@method(base="optional", formula="(Σ w·|δ|) · M/|M|, M = Σ w·δ/|δ|", source="mergekit")
def multislerp(subject: Subject, *, weight: PerModel, normalize_weights: bool = True, eps: float = 1e-8) -> Steps:
    """Mean direction at the mean length, of several models or of what they add to a base.

    Args:
        subject: the tensor.
        weight: of each model.
        normalize_weights: divide them by their sum.
        eps: added to lengths; a mean direction shorter than this counts as none, and the weighted sum is taken.
    """
    if subject.models == 1:
        return lambda block, _: block[-1]
    weights = shares(weight) if normalize_weights else weight
    products = yield from gram(subject.has_base)
    lengths = products.diagonal().sqrt()
    direction = torch.tensor(weights, dtype=torch.float64) / (lengths + eps)
    length = (direction @ products @ direction).clamp(min=0).sqrt().item()
    if length < eps:
        coefficients = list(weights)
    else:
        coefficients = (
            direction * sum(w * n for w, n in zip(weights, lengths.tolist(), strict=True)) / length
        ).tolist()
    if subject.has_base:
        return sum_of_deltas(coefficients)
    return sum_of_inputs(coefficients)


@method(base="optional", formula="Karcher mean of the directions · mean length", source="Karcher 1977")
def karcher(subject: Subject, *, weight: PerInput = (1.0,), max_iter: int = 10, tol: float = 1e-5) -> Steps:
    """The mean on the sphere: where the weighted tangents to all inputs sum to zero; a base is one of them.

    Args:
        subject: the tensor.
        weight: of each input (mergekit: all equal).
        max_iter: most iterations.
        tol: stop when a step is shorter than this angle.
    """
    weights = torch.tensor(shares(weight), dtype=torch.float64)
    products = yield from gram(from_base=False)
    lengths = products.diagonal().sqrt()
    there = lengths > 0  # a zero tensor has no direction
    if not there.any():
        return lambda block, _: torch.zeros_like(block[0])
    units = products[there][:, there] / torch.outer(lengths[there], lengths[there])
    mean = _karcher_mean(units, weights[there] / weights[there].sum(), max_iter, tol)
    coefficients = torch.zeros_like(weights)
    coefficients[there] = mean * (weights @ lengths) / lengths[there]
    return sum_of_inputs(coefficients.tolist())


def _karcher_mean(units: torch.Tensor, weights: torch.Tensor, max_iter: int, tol: float) -> torch.Tensor:
    """The mean as a combination of unit vectors, from their inner products: float64 of shape (n,)."""

    def length(vector: torch.Tensor) -> torch.Tensor:
        return (vector @ units @ vector).clamp(min=0).sqrt()

    mean = weights
    if length(mean) < tol:
        mean = torch.zeros_like(weights)
        mean[0] = 1
    mean = mean / length(mean)
    for _ in range(max_iter):
        cosines = (units @ mean).clamp(-1, 1)
        angles = cosines.acos()
        # θ/sin θ is 1 at 0; opposite to the mean there is no tangent
        pulls = weights * torch.where(angles.sin() > tol, angles / angles.sin(), (cosines > 0).double())
        tangent = pulls - (pulls @ cosines) * mean
        step = length(tangent)
        if step < tol:
            break
        mean = step.cos() * mean + step.sin() / step * tangent
        mean = mean / length(mean)
    return mean


@method(base="optional", formula="argmin Σ w·|x − m|", source="Weiszfeld 1937; Vardi & Zhang 2000")
def geometric_median(
    subject: Subject, *, weight: PerInput = (1.0,), max_iter: int = 100, tol: float = 1e-9
) -> Combine | Steps:
    """The point with the least sum of distances to the inputs: unlike the mean, one stray model hardly moves it.

    Args:
        subject: the tensor.
        weight: of each input, none below zero; a base is one of them.
        max_iter: most iterations.
        tol: stop when a step is shorter than this share of the inputs' spread.
    """
    weights = torch.tensor(shares(weight), dtype=torch.float64)
    if (weights < 0).any():
        raise UsageError("weight: a geometric median has no weights below zero.")
    median = torch.zeros_like(weights)
    if subject.inputs > 1:
        # seen from the first input, so that small differences of large weights keep their digits
        products = torch.zeros(subject.inputs, subject.inputs, dtype=torch.float64)
        products[1:, 1:] = yield from gram(from_base=True)
        median = _weiszfeld(products, weights, max_iter, tol)
    return sum_of_deltas(median[1:].tolist())


def _weiszfeld(products: torch.Tensor, weights: torch.Tensor, max_iter: int, tol: float) -> torch.Tensor:
    """The median as a combination of the points, from their inner products: float64 of shape (n,)."""

    def length(vectors: torch.Tensor) -> torch.Tensor:
        return ((vectors @ products) * vectors).sum(-1).clamp(min=0).sqrt()

    points = torch.eye(len(weights), dtype=torch.float64)
    median = weights
    spread = length(points - median).max()
    for _ in range(max_iter):
        distances = length(points - median)
        away = distances > tol * spread
        pulls = torch.where(away, weights / distances, 0.0)
        if pulls.sum() == 0:
            break
        target = pulls / pulls.sum()
        step = target - median
        # a point that is hit holds on with its weight
        force = length(step) * pulls.sum()
        step = step * (1 - weights[~away].sum() / force).clamp(min=0) if force > 0 else step * 0
        median = median + step
        if length(step) <= tol * spread:
            break
    return median
