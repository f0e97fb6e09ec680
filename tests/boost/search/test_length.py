"""Length control: the regression, the GLM's published properties, and its fit against the conditions of an optimum."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_lite.boosting.search.length import (
    FOLDS,
    PENALTIES,
    Judgements,
    at_equal_length,
    fit,
    fit_cross_validated,
    win_rates,
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def judge(rng: np.random.Generator, n: int, length: float, model: float, longer: float) -> Judgements:
    """A judge with a known taste for length, of answers that are longer by ``longer`` characters on average."""
    baseline = rng.integers(500, 2000, n).astype(float)
    answer = np.maximum(baseline + longer + rng.normal(0, 300, n), 1)
    shorter = baseline - answer
    t = np.tanh(shorter / shorter.std(ddof=1))
    return Judgements(sigmoid(length * t + model), answer, baseline)


def swapped(one: Judgements) -> Judgements:
    return Judgements(1 - one.preferred, one.baseline_length, one.length)


def test_the_fit_meets_the_conditions_of_an_optimum() -> None:
    """Where a weight is not 0 the slope of the loss is minus its sign; elsewhere it is at most 1."""
    rng = np.random.default_rng(0)
    for c in (1e-4, 0.003, 0.02, 0.1, 1.0, 1e4):
        for _ in range(5):
            x = rng.normal(0, 1, (120, 3)) * [1, 3, 0.2]
            p, s = rng.uniform(0, 1, 120).round(int(rng.integers(0, 3))), rng.uniform(0.1, 1, 120)
            w = fit(x, p, s, c)
            slope = c * x.T @ (s * (sigmoid(x @ w) - p))
            for one, at in zip(w, slope, strict=True):
                assert abs(at + np.sign(one)) < 1e-5 if one else abs(at) <= 1 + 1e-9, (c, w, slope)


def test_separable_data_have_a_fit() -> None:
    x = np.array([[1.0], [2.0], [-1.0]])
    w = fit(x, np.array([1.0, 1.0, 0.0]), np.ones(3), 1e4)
    assert np.isfinite(w).all() and w[0] > 5


def test_cross_validation_takes_the_penalty_that_predicts_best() -> None:
    rng = np.random.default_rng(1)
    x, s = rng.normal(0, 1, (100, 3)), np.ones(100)
    p = sigmoid(x @ [1.0, -0.5, 0.3] + rng.normal(0, 0.3, 100))
    held_out = []
    for c in PENALTIES:
        losses = []
        for fold in range(FOLDS):
            out = np.arange(100) % FOLDS == fold
            q = sigmoid(x[out] @ fit(x[~out], p[~out], s[~out], c))
            losses.append(-(p[out] * np.log(q) + (1 - p[out]) * np.log(1 - q)).sum())
        held_out.append(sum(losses))
    expected = fit(x, p, s, PENALTIES[int(np.argmin(held_out))])
    np.testing.assert_allclose(fit_cross_validated(x, p, s), expected)


def test_a_baseline_against_itself_has_fifty() -> None:
    lengths = np.arange(1.0, 101)
    found = win_rates(Judgements(np.full(100, 0.5), lengths, lengths))
    assert found.at_equal_length == 50 and found.raw == 50 and not found.extreme


@pytest.mark.parametrize("seed", range(5))
def test_two_models_rates_against_each_other_sum_to_a_hundred(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one = judge(rng, 200, rng.normal(), rng.normal(), rng.normal(0, 300))
    assert win_rates(one).at_equal_length + win_rates(swapped(one)).at_equal_length == pytest.approx(100, abs=1e-6)


def test_a_win_by_length_alone_is_taken_back() -> None:
    """A judge that likes length (w < 0 on the baseline's excess) and sees no other difference."""
    long = judge(np.random.default_rng(2), 805, length=-2.0, model=0.0, longer=400)
    found = win_rates(long)
    assert found.raw > 70 and abs(found.at_equal_length - 50) < 2
    assert found.extreme


def test_a_win_by_merit_stays() -> None:
    good = judge(np.random.default_rng(3), 805, length=-0.5, model=1.0, longer=0)
    found = win_rates(good)
    assert abs(found.at_equal_length - 100 * sigmoid(np.array(1.0))) < 1
    assert found.weights == pytest.approx((-0.5, 1.0), abs=0.1)


def test_a_gain_that_goes_with_length_is_only_length() -> None:
    rng = np.random.default_rng(5)
    longer = rng.normal(150, 200, 400)
    t = np.tanh(longer / longer.std(ddof=1))
    found = at_equal_length(0.5 * t + rng.normal(0, 0.5, 400), longer)
    assert found is not None and found.only_length
    assert found.at_equal_length.low <= 0 <= found.at_equal_length.high


def test_a_gain_at_any_length_is_no_gain_of_length() -> None:
    rng = np.random.default_rng(6)
    longer = rng.normal(150, 200, 400)
    found = at_equal_length(0.3 + rng.normal(0, 0.5, 400), longer)
    assert found is not None and not found.only_length
    assert found.at_equal_length.low <= 0.3 <= found.at_equal_length.high


@pytest.mark.parametrize("taste", ["proportional", "saturating", "none"])
def test_the_intercepts_interval_covers_the_truth(taste: str) -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(100):
        longer = rng.normal(100, 200, 150)
        z = longer / longer.std(ddof=1)
        by_length = {"proportional": 0.4 * z, "saturating": 0.4 * np.tanh(z), "none": 0 * z}[taste]
        found = at_equal_length(0.1 + by_length + rng.normal(0, 0.5, 150), longer)
        assert found is not None
        covered += found.at_equal_length.low <= 0.1 <= found.at_equal_length.high
    assert 90 <= covered <= 99


def test_the_intercept_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(8)
    longer = rng.normal(50, 100, 40)
    gains = rng.normal(0.1, 1, 40)
    z = longer / longer.std(ddof=1)
    expected = np.linalg.lstsq(np.stack([np.ones(40), z, np.tanh(z)], axis=1), gains)[0][0]
    found = at_equal_length(gains, longer)
    assert found is not None and found.at_equal_length.mean == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_too_few_answers_have_no_regression(n: int) -> None:
    assert at_equal_length(np.ones(n), np.arange(float(n))) is None


def test_equal_lengths_have_no_regression() -> None:
    assert at_equal_length(np.ones(10), np.full(10, 5.0)) is None
