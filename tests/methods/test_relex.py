"""RELEX: the published example, what can't change the result, and the share of variance that licenses it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.errors import UsageError
from mergekit_lite.methods import merge_tensors, method_named
from mergekit_lite.methods.contract import TensorInfo, WithCoefficients, answered
from mergekit_lite.methods.relex import least_share, principal
from tests.methods.reference import REFERENCES

DELTAS = np.array([[1, 2, 0], [2.1, 3.9, 0.1], [2.9, 6.1, -0.1]]) / 100


def relex(deltas: Any, steps: list[float], to: float, base: Any = 0.0) -> np.ndarray:
    deltas = np.asarray(deltas, np.float64)
    start = np.zeros_like(deltas[0]) + base
    models = [torch.from_numpy(start + delta) for delta in deltas]
    return merge_tensors("relex", torch.from_numpy(start), models, step=steps, to_step=to).numpy() - start


def explained(deltas: np.ndarray, steps: tuple[float, ...]) -> WithCoefficients:
    info = TensorInfo("w", deltas[0].shape, len(deltas), has_base=True)
    steps_of_method = method_named("relex").function(info, step=steps, to_step=9.0)
    return answered(steps_of_method, lambda _: (deltas @ deltas.T)[np.tril_indices(len(deltas))])


def run(seed: int, count: int, elements: int, drift: float, noise: float) -> tuple[np.ndarray, list[float]]:
    """A run that drifts and wanders, looked at at uneven steps."""
    draws = np.random.default_rng(seed)
    steps = np.sort(draws.choice(np.arange(1, 12 * count), count, replace=False))
    walk = np.cumsum(draws.normal(size=(12 * count, elements)) * noise, 0)
    return np.outer(steps, draws.normal(size=elements) * drift) + walk[steps - 1], steps.astype(float).tolist()


def test_published_example() -> None:
    _, (along, total) = principal(DELTAS @ DELTAS.T)
    assert round(along / total, 7) == 0.9992337
    np.testing.assert_allclose(relex(DELTAS, [1, 2, 3], 10), [0.0999167, 0.2020754, -0.0007473], atol=5e-8)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 9), to=st.floats(0, 500))
def test_is_that_of_singular_vectors_and_a_fitted_line(seed: int, count: int, to: float) -> None:
    deltas, steps = run(seed, count, 50, 1e-3, 1e-3)
    expected = REFERENCES["relex"](
        torch.zeros(50, dtype=torch.float64), [torch.from_numpy(delta) for delta in deltas], step=steps, to_step=to
    ).numpy()
    size = np.abs(expected).max() + np.abs(deltas).max()
    np.testing.assert_allclose(relex(deltas, steps, to), expected, rtol=1e-7, atol=1e-9 * size)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), order=st.permutations(range(5)), factor=st.floats(0.01, 100))
def test_order_unit_of_steps_and_sign_do_not_matter(seed: int, order: list[int], factor: float) -> None:
    deltas, steps = run(seed, 5, 30, 1e-3, 3e-4)
    once = relex(deltas, steps, 200)
    close: dict[str, float] = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(relex(deltas[order], [steps[i] for i in order], 200), once, **close)
    # steps may be counted in epochs or tokens, from any begin: only where the target lies among them counts
    np.testing.assert_allclose(relex(deltas, [step * factor for step in steps], 200 * factor), once, **close)
    np.testing.assert_allclose(relex(deltas, [step + 1000 for step in steps], 1200), once, **close)
    np.testing.assert_allclose(relex(-deltas, steps, 200), -once, **close)
    np.testing.assert_allclose(relex(deltas * 1e-6, steps, 200), once * 1e-6, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("steps", [[1, 2, 3], [25, 50, 75], [3, 40, 41], [7, 2, 90]])
def test_a_run_on_a_line_is_followed_to_the_step_that_is_asked_for(steps: list[float]) -> None:
    """No index stands for a step, and no target is doubled: at any step the run is where its line is."""
    direction, origin = np.array([0.3, -0.2, 0.5, 0.0]), 0.25
    deltas = [(origin + step / 100) * direction for step in steps]
    for to in (0, 10, 75, 500, 1000):
        np.testing.assert_allclose(relex(deltas, steps, to), (origin + to / 100) * direction, rtol=1e-9, atol=1e-15)


def test_what_did_not_change_is_the_base_to_the_bit() -> None:
    base = torch.tensor([1.5, -0.0, 3e-5]).bfloat16()
    merged = merge_tensors("relex", base, [base, base], step=[1, 2], to_step=1000)
    assert torch.equal(merged.view(torch.int16), base.view(torch.int16))
    told = explained(np.zeros((2, 3)), (1.0, 2.0))
    assert told.coefficients == (0.0, 0.0) and told.explained is not None and told.explained.total == 0


def test_what_is_not_finite_goes_through() -> None:
    base, bad = torch.zeros(3), torch.tensor([1.0, math.nan, 2.0])
    assert merge_tensors("relex", base, [bad, base + 1], step=[1, 2], to_step=3).isnan().all()


def test_bound_lies_between_a_walk_and_a_line() -> None:
    """As documented: wandering explains 84 % of itself at three even steps, as much drift as that 91 %."""
    for steps, walk, bound in (((1, 2, 3), 0.84, 0.91), (tuple(range(1, 2000)), 0.81, 0.88)):
        wandering = np.minimum.outer(steps, steps).astype(float)
        assert round(principal(wandering)[1][0] / np.trace(wandering), 2) == walk
        assert round(least_share(tuple(map(float, steps))), 2) == bound
    assert least_share((25.0, 50.0, 75.0)) == pytest.approx(least_share((1.0, 2.0, 3.0)))


def test_bound_parts_runs_that_drift_from_runs_that_wander() -> None:
    for seed in range(10):
        for drift, noise, enough in ((1e-3, 1e-4, True), (1e-5, 1e-3, False)):
            deltas, steps = run(seed, 5, 4000, drift, noise)
            told = explained(deltas, tuple(steps)).explained
            assert told is not None and (told.along >= told.bound * told.total) is enough, (seed, drift)


def test_one_step_belongs_to_one_checkpoint() -> None:
    zero = torch.zeros(2)
    with pytest.raises(UsageError, match="Two checkpoints have step 5"):
        merge_tensors("relex", zero, [zero, zero, zero], step=[5, 7, 5], to_step=9)
    with pytest.raises(UsageError, match="relex merges 2 or more models"):
        merge_tensors("relex", zero, [zero], step=[5], to_step=9)
