"""RELEX: the line that a training run's checkpoints lie along, followed on to a later step.

Paper: "RELEX", 2026, arXiv 2605.21468. For each tensor, with δᵢ = xᵢ − base at the step tᵢ:

    G = (⟨δᵢ, δⱼ⟩), its largest eigenvalue λ with the unit vector u:   δᵢ ≈ uᵢ·(√λ·v),   √λ·v = Σ uᵢ·δᵢ
    ℓ(t) = the least-squares line through (tᵢ, uᵢ), with an intercept
    out = base + ℓ(to_step)·Σ uᵢ·δᵢ

So the output is a sum of checkpoints with the coefficients ℓ(to_step)·uᵢ, and v is never stored. The sign of u cancels
out. λ/tr(G), the share of the checkpoints' variance that the line explains, is the licence to follow it: the report has
it for each tensor, and for all together, weighted by tr(G).

How much is enough follows from the steps. A run that only wanders, tᵢ steps of one size without any direction, has the
Gram matrix min(tᵢ, tⱼ), of which one line explains 84 % for three even steps and 81 % for many: a high share alone
proves nothing. One that drifts as well, so that at the last step T both have come equally far, has
min(tᵢ, tⱼ) + tᵢ·tⱼ/T: 91 % for three steps. A share below that is warned of: most of the way is no direction.

The released code takes the checkpoints' numbers 0, 1, 2 … for the steps, which is wrong for uneven ones, and for one
model doubles the target; here steps are what is given, and a target is the step asked for. The step of the base is 0
and enters nothing. Before the last checkpoint the line gives the run without its noise.
"""

from __future__ import annotations

import math

from mergekit_lite.deferred import np
from mergekit_lite.errors import UsageError
from mergekit_lite.methods.contract import Explained, Steps, TensorInfo, Totals, WithCoefficients
from mergekit_lite.methods.parameters import NotNegative, PerModel
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.statistics import gram
from mergekit_lite.ops.operations import WeightedSum


def differ(*, step: tuple[float, ...], **_: object) -> None:
    """Raise UsageError where two checkpoints are of one step."""
    if twice := sorted({each for each in step if step.count(each) > 1}):
        raise UsageError(f"Two checkpoints have step {', '.join(f'{each:g}' for each in twice)}: each has its own.")


@method(
    given="run",
    models=(2, None),
    formula="base + ℓ(to_step)·Σ uᵢ·(xᵢ − base)",
    source="RELEX 2026, arXiv 2605.21468",
    check=differ,
)
def relex(info: TensorInfo, *, step: PerModel[NotNegative], to_step: NotNegative) -> Steps:
    """Extrapolate a training run: its checkpoints are the models, the base is where it began (step 0).

    Args:
        step: of training at which each checkpoint was written; in any order, and uneven ones too.
        to_step: the step to go on to, in the same count.
    """
    products = yield from gram(from_base=True)
    direction, explained = principal(products)
    coefficients = tuple((direction * _line_at(to_step, np.array(step), direction)).tolist())
    changed = explained[1] != 0
    merge = WeightedSum(coefficients, from_base=True) if changed else WeightedSum((1.0,), order=(0,))  # to the bit
    return WithCoefficients(coefficients, merge, Explained(*explained, bound=least_share(step)))


def principal(products: Totals) -> tuple[Totals, tuple[float, float]]:
    """Return a Gram matrix's first eigenvector, with its eigenvalue and the sum of all of them.

    Zeros where all is zero; what isn't finite goes through.
    """
    total = float(np.trace(products))
    if not np.isfinite(products).all() or total <= 0:
        return np.full(len(products), 0.0 if total == 0 else math.nan), (total, total)
    # Scaled, so that squares of tiny or huge deltas neither vanish nor overflow on the way.
    values, vectors = np.linalg.eigh(products / total)
    return vectors[:, -1], (float(values[-1]) * total, total)


def least_share(steps: tuple[float, ...]) -> float:
    """Return the share that a line explains of a run which has drifted no further than it has wandered."""
    at = np.array(steps, np.float64)
    products = np.minimum.outer(at, at) + np.outer(at, at) / at.max()
    return float(np.linalg.eigvalsh(products)[-1] / np.trace(products))


def _line_at(target: float, steps: Totals, heights: Totals) -> float:
    """Return the height at ``target`` of the least-squares line through the points (step, height)."""
    away = steps - steps.mean()
    slope = (away @ heights) / (away @ away)
    return float(heights.mean() + slope * (target - steps.mean()))
