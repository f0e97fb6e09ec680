"""Means along the sphere: slerp, nuslerp, multislerp, karcher; and the geometric median, found in the same small space.

Every result is Σ c·x, and the coefficients follow from the inputs' inner products: those are summed in float64, and
iterations run in them, not over the elements.

Papers: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; Karcher 1977 (as used by mergekit);
Weiszfeld 1937, with Vardi & Zhang, PNAS 2000, for points that are hit.

Where mergekit differs: it computes nuslerp, multislerp and karcher in the models' own dtype. Its slerp takes the
straight line when |cos θ| > 0.9995, as here. Its multislerp projects on the tangent space at the normalised weighted
mean m, where the weighted tangents sum to zero (Σ w·(u − (u·m)·m) = |M|·m − |M|·m): what it computes is the normalised
mean M/|M| at the mean length, and that is what is computed here. ``karcher`` is the mean on the sphere.

nuslerp merges two models, as in mergekit, or more one after the other: each next one at its share of the weights so
far. With equal weights that is WARP's SLERP of M policies, slerpm(θ₁…θ_M) = slerp(slerpm(θ₁…θ_M₋₁), θ_M, 1/M) (Ramé et
al. 2024, arXiv 2406.16768, equation 26), which takes one angle for each layer where nuslerp takes one for each tensor.
Of more than two their order counts.
"""

from __future__ import annotations

import math

from mergekit_lite.deferred import np, torch
from mergekit_lite.methods.contract import Block, Merge, Reduction, Steps, TensorInfo, Totals
from mergekit_lite.methods.linear import have_a_mean, shares
from mergekit_lite.methods.parameters import Count, NotNegative, PerInput, PerModel
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.statistics import gram
from mergekit_lite.ops.operations import WeightedSum
from mergekit_lite.ops.torch_ops import deltas

STRAIGHT = 1 - 0.9995**2  # of sin² θ, up to which slerp takes the straight line
PARALLEL = 1e-16  # up to which nuslerp does
CANCELLED = 1e-6  # of a sum of weights, below which it is none (as in mergekit)


def _on_arc(t: float, products: Totals, straight: float) -> tuple[Totals, Totals]:
    """Return the coefficients of a and b at ``t`` of the arc from a to b.

    ``products`` are ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩, float64 of shape (3, …). Where sin² of the angle is not above
    ``straight``, the arc is the straight line.
    """
    # cos θ = ⟨a, b⟩ / (|a|·|b|); a vector without length counts as orthogonal
    lengths = np.sqrt(products[0] * products[1])
    cosine = np.clip(np.where(lengths > 0, products[2] / np.where(lengths > 0, lengths, 1), 0), -1, 1)
    angle = np.arccos(cosine)
    # the straight line where sin θ is too small to divide by; the 1 in its place divides nothing that is used
    line = 1 - cosine * cosine <= straight
    sine = np.where(line, 1, np.sin(angle))
    a = np.where(line, 1 - t, np.sin((1 - t) * angle) / sine)
    b = np.where(line, t, np.sin(t * angle) / sine)
    return a, b


def _in_turn(weights: tuple[float, ...], products: Totals) -> list[Totals]:
    """Return the coefficients of vectors that are met one after the other, each at its share of the weights so far.

    ``products`` are the vectors' inner products, float64 of shape (n, n, …); so are the coefficients of each, (…).
    """
    coefficients = [np.ones(products.shape[2:])]
    for number in range(1, len(weights)):
        total = sum(weights[: number + 1])
        t = weights[number] / total if abs(total) >= CANCELLED else 1 / (number + 1)
        met = np.stack(coefficients)
        square = np.einsum("i...,ij...,j...->...", met, products[:number, :number], met).clip(min=0)  # NaN stays
        across = np.einsum("i...,i...->...", met, products[:number, number])
        a, b = _on_arc(t, np.stack([square, products[number, number], across]), PARALLEL)
        coefficients = [*(a * each for each in coefficients), b]
    return coefficients


def _products(vectors: Block, axis: int) -> torch.Tensor:
    """Return inner products along one axis of n matrices: float64 of shape (n, n, other axis)."""
    wide = [vector.double() for vector in vectors]
    return torch.stack([torch.stack([(one * other).sum(axis) for other in wide]) for one in wide])


@method(given="models", models=(1, 1), formula="(sin((1−t)θ)·base + sin(tθ)·x) / sin θ", source="Shoemake 1985")
def slerp(info: TensorInfo, *, t: float) -> Steps:
    """Interpolate between the base and one model along the sphere, each tensor as one vector.

    Args:
        t: 0 is the base, 1 the model; beyond them it goes on along the arc.
    """
    products = yield from gram(from_base=False)
    a, b = _on_arc(t, products[[0, 1, 0], [0, 1, 1]], STRAIGHT)
    return WeightedSum((float(a), float(b)))


def _nuslerp_rows(shape: tuple[int, ...], *, nuslerp_flatten: bool, nuslerp_row_wise: bool, **_: object) -> int:
    if nuslerp_flatten or not shape:
        return 0
    return math.prod(shape[1:]) if nuslerp_row_wise else shape[-1]


@method(
    given="models",
    base="optional",
    models=(2, None),
    rows=_nuslerp_rows,
    formula="base + slerp(x₁ − base, x₂ − base, w₂/(w₁+w₂)), then with x₃ at w₃/(w₁+w₂+w₃) …",
    source="mergekit; Ramé et al. 2024, arXiv 2406.16768",
)
def nuslerp(
    info: TensorInfo, *, weight: PerModel[float], nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Steps:
    """Interpolate along the sphere between models, or what they add to a base, at the place their weights give.

    Args:
        weight: of each model; only their ratios count. Weights that sum to less than 1e-6 mean equal ones, as
            in mergekit.
        nuslerp_flatten: the whole tensor is one vector.
        nuslerp_row_wise: where not: vectors run along the first axis instead of the last (sic, as in mergekit).
    """

    def vectors(block: Block) -> Block:
        return deltas(block) if info.has_base else block

    def at(block: Block, coefficients: list[Totals]) -> torch.Tensor:
        first, *others = (x * torch.from_numpy(of).to(x) for x, of in zip(vectors(block), coefficients, strict=True))
        merged = sum(others, first)
        return merged.add_(block[0]) if info.has_base else merged

    if nuslerp_flatten or not info.shape:
        products = yield from gram(info.has_base)
        return WeightedSum(tuple(map(float, _in_turn(weight, products))), info.has_base)
    if nuslerp_row_wise:
        columns = _in_turn(weight, (yield Reduction(lambda block, _: _products(vectors(block), 0))))
        return lambda block, _: at(block, columns)

    def by_rows(block: Block, _: int) -> torch.Tensor:
        products = _products(vectors(block), 1).cpu().numpy()
        return at(block, [each[:, None] for each in _in_turn(weight, products)])

    return by_rows


@method(
    given="models", base="optional", check=have_a_mean, formula="(Σ w·|δ|) · M/|M|, M = Σ w·δ/|δ|", source="mergekit"
)
def multislerp(
    info: TensorInfo, *, weight: PerModel[float], normalize_weights: bool = True, eps: NotNegative = 1e-8
) -> Steps:
    """Take the mean direction at the mean length, of several models or of what they add to a base.

    Args:
        weight: of each model.
        normalize_weights: divide them by their sum.
        eps: added to lengths; a mean direction shorter than this counts as none, and the weighted sum is taken.
    """
    if info.models == 1:
        return lambda block, _: block[-1]
    weights = shares(weight) if normalize_weights else weight
    products = yield from gram(info.has_base)
    lengths = np.sqrt(products.diagonal())
    direction = np.array(weights) / (lengths + eps)
    length = _length(direction, products)
    coefficients = direction * (weights @ lengths) / length if length >= eps else np.array(weights)
    return WeightedSum(tuple(coefficients.tolist()), info.has_base)


@method(
    given="models",
    base="optional",
    check=have_a_mean,
    formula="Karcher mean of the directions · mean length",
    source="Karcher 1977",
)
def karcher(
    info: TensorInfo, *, weight: PerInput[float] = (1.0,), max_iter: Count = 10, tol: NotNegative = 1e-5
) -> Steps:
    """Take the mean on the sphere: where the weighted tangents to all inputs sum to zero; a base is one of them.

    Args:
        weight: of each input (mergekit: all equal).
        max_iter: most iterations.
        tol: stop when a step is shorter than this angle.
    """
    weights = np.array(shares(weight))
    products = yield from gram(from_base=False)
    lengths = np.sqrt(products.diagonal())
    # the directions, of those inputs that have one: a zero tensor has none
    directed = lengths > 0
    if not directed.any():
        return WeightedSum((0.0,) * len(weights))
    units = products[directed][:, directed] / np.outer(lengths[directed], lengths[directed])
    mean = _karcher_mean(units, weights[directed] / weights[directed].sum(), max_iter, tol)
    # the mean direction at the weighted mean length, as a combination of the inputs themselves
    coefficients = np.zeros_like(weights)
    coefficients[directed] = mean * (weights @ lengths) / lengths[directed]
    return WeightedSum(tuple(coefficients.tolist()))


def _karcher_mean(units: Totals, weights: Totals, max_iter: int, tol: float) -> Totals:
    """Return the mean as a combination of unit vectors, from their inner products: float64 of shape (n,)."""
    # begin at the normalised weighted sum; where that vanishes, at the first vector
    mean = weights
    if _length(mean, units) < tol:
        mean = np.zeros_like(weights)
        mean[0] = 1
    mean = mean / _length(mean, units)
    for _ in range(max_iter):
        # each vector's angle to the mean
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        sines = np.sin(angles)
        # The tangent at the mean towards a vector u, as long as the angle: θ/sin θ·(u − cos θ·mean). θ/sin θ is 1 at 0;
        # opposite to the mean there is no tangent.
        pulls = weights * np.where(sines > tol, angles / np.where(sines > tol, sines, 1), cosines > 0)
        # the weighted mean of the tangents: zero at the mean on the sphere
        tangent = pulls - (pulls @ cosines) * mean
        step = _length(tangent, units)
        if step < tol:
            break
        # go that far along the great circle, and undo what rounding does to the length
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / _length(mean, units)
    return mean


@method(
    given="models",
    base="optional",
    check=have_a_mean,
    formula="argmin Σ w·|x − m|",
    source="Weiszfeld 1937; Vardi & Zhang 2000",
)
def geometric_median(
    info: TensorInfo, *, weight: PerInput[NotNegative] = (1.0,), max_iter: Count = 100, tol: NotNegative = 1e-9
) -> Merge | Steps:
    """Take the point with the least sum of distances to the inputs: unlike the mean, one stray model hardly moves it.

    Args:
        weight: of each input; a base is one of them.
        max_iter: most iterations.
        tol: stop when a step is shorter than this share of the inputs' spread.
    """
    weights = np.array(shares(weight))
    if info.inputs == 1:
        return WeightedSum((1.0,), order=(0,))
    # seen from the first input, so that small differences of large weights keep their digits
    products = np.zeros((info.inputs, info.inputs))
    products[1:, 1:] = yield from gram(from_base=True)
    median = _weiszfeld(products, weights, max_iter, tol)
    return WeightedSum(tuple(median[1:].tolist()), from_base=True)


def _weiszfeld(products: Totals, weights: Totals, max_iter: int, tol: float) -> Totals:
    """Return the median as a combination of the points, from their inner products: float64 of shape (n,)."""
    points = np.eye(len(weights))
    median = weights
    spread = max(_length(point - median, products) for point in points)
    for _ in range(max_iter):
        # each point that isn't hit pulls by its weight over its distance
        distances = np.array([_length(point - median, products) for point in points])
        away = distances > tol * spread
        pulls = np.where(away, weights / np.where(away, distances, 1), 0)
        if pulls.sum() == 0:
            break
        # Weiszfeld's step: to the mean of the points so weighted
        target = pulls / pulls.sum()
        step = target - median
        # A point that is hit holds on with its weight: the step shrinks by that share of the others' pull, to nothing
        # where the point is the median (Vardi & Zhang).
        force = _length(step, products) * pulls.sum()
        step = step * max(1 - weights[~away].sum() / force, 0) if force > 0 else step * 0
        median = median + step
        if _length(step, products) <= tol * spread:
            break
    return median


def _length(vector: Totals, products: Totals) -> float:
    """Return the length of a combination of vectors, from their inner products."""
    return math.sqrt(max(float(vector @ products @ vector), 0.0))  # NaN stays
