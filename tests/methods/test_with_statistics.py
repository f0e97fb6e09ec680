"""Methods that read statistics: numbers of released code, a naive second way, and what has to hold for any inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_lite import RunError, UsageError, merge_states, merge_tensors

EYE = torch.eye(2, dtype=torch.float64)
SWAPPED = EYE.flip(0)
FISHER = [torch.tensor(rows, dtype=torch.float64) for rows in ([[4, 0], [1, 0]], [[1, 1], [1, 0]])]
INPUTS = [torch.tensor(rows, dtype=torch.float64) for rows in ([[1, 2], [0, 1], [1, 0]], [[2, 0], [1, 1]])]
GRAMS = [x.mT @ x / len(x) for x in INPUTS]
LEAST = 1e-12


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grams(seeds: range, size: int, tokens: int = 50) -> list[torch.Tensor]:
    return [(x := drawn(100 + seed, tokens, size)).mT @ x / tokens for seed in seeds]


@pytest.mark.parametrize(
    ("balance", "expected"),
    [(False, [[0.8, 0.999999], [0.5, 0.5]]), (True, [[0.6269124, 0.9999996], [0.7041836, 0.2958164]])],
)
def test_fisher_gives_the_numbers_of_fusion_bench(balance: bool, expected: list[list[float]]) -> None:
    merged = merge_tensors("fisher", None, [EYE, SWAPPED], statistics=FISHER, balance=balance)
    np.testing.assert_allclose(merged, expected, atol=2e-7)


@pytest.mark.parametrize(
    ("non_diagonal", "expected"),
    [
        (1.0, [[0.2121212, 0.4242424], [0.7878788, 0.5757576]]),
        (0.9, [[0.2195746, 0.4012831], [0.7804254, 0.5987169]]),
    ],
)
def test_regmean_gives_the_numbers_of_fusion_bench(non_diagonal: float, expected: list[list[float]]) -> None:
    options = {"statistics": GRAMS, "non_diagonal": non_diagonal, "ridge": LEAST}
    np.testing.assert_allclose(merge_tensors("regmean", None, [EYE, SWAPPED], **options), expected, atol=6e-8)
    turned = merge_tensors("regmean", None, [EYE, SWAPPED.mT], gram_axis=0, **options)
    np.testing.assert_allclose(turned.mT, expected, atol=6e-8)


def regmean(
    models: list[torch.Tensor], gram: list[torch.Tensor], weight: list[float], a: float, ridge: float
) -> object:
    """RegMean as its formula says, in numpy."""
    scaled = [w * np.where(np.eye(len(g)), g, a * g.numpy()) for w, g in zip(weight, gram, strict=True)]
    size = len(scaled[0])
    least = ridge * np.trace(sum(scaled)) / (size * sum(weight))
    scaled = [g + w * least * np.eye(size) for w, g in zip(weight, scaled, strict=True)]
    return np.linalg.solve(sum(scaled), sum(g @ x.numpy().T for g, x in zip(scaled, models, strict=True))).T


@pytest.mark.parametrize("tokens", [50, 3])
@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_regmean_is_its_formula(tokens: int, ridge: float) -> None:
    """With fewer tokens than inputs, too, where the released code has no inverse."""
    models, own, weight = [drawn(seed, 5, 8) for seed in range(3)], grams(range(3), 8, tokens), [1.0, 0.5, 2.0]
    options = {"statistics": own, "weight": weight, "ridge": ridge}
    for a in (1.0, 0.9):
        merged = merge_tensors("regmean", None, models, non_diagonal=a, **options)
        np.testing.assert_allclose(merged, regmean(models, own, weight, a, ridge), rtol=1e-7, atol=1e-9)


def test_regmean_answers_the_inputs_of_each_model_best() -> None:
    """No other matrix has a smaller Σ‖X(W − Wᵢ)ᵀ‖²: every change of the result makes it larger."""
    models, own = [drawn(seed, 5, 8) for seed in range(2)], grams(range(2), 8)

    def loss(matrix: torch.Tensor) -> float:
        pairs = [(matrix - model, gram) for model, gram in zip(models, own, strict=True)]
        return float(sum((delta @ gram * delta).sum() for delta, gram in pairs))

    merged = merge_tensors("regmean", None, models, statistics=own, ridge=LEAST)
    assert all(loss(merged) < loss(merged + 1e-3 * drawn(seed, 5, 8)) for seed in range(20))
    assert loss(merged) < loss(sum(models) / 2)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_equal_models_give_the_model_to_the_bit(method: str) -> None:
    model = drawn(0, 6, 6).float()
    beside = [gram.float() for gram in grams(range(3), 6)]
    if method == "fisher":
        beside = [part.abs() for part in beside]
    assert torch.equal(merge_tensors(method, None, [model] * 3, statistics=beside), model)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_the_order_of_models_changes_nothing_but_rounding(method: str) -> None:
    models, beside = [drawn(seed, 6, 6) for seed in range(3)], grams(range(3), 6)
    beside = [part.abs() for part in beside] if method == "fisher" else beside
    options = {"weight": [1.0, 2.0, 3.0], "statistics": beside}
    merged = merge_tensors(method, None, models, **options)
    turned = {name: value[::-1] for name, value in options.items()}
    np.testing.assert_allclose(merge_tensors(method, None, models[::-1], **turned), merged, rtol=1e-9, atol=1e-12)


def test_inputs_that_no_model_saw_get_the_average() -> None:
    models, own = [drawn(seed, 4, 6) for seed in range(2)], grams(range(2), 6)
    for gram in own:
        gram[2], gram[:, 2] = 0, 0
    merged = merge_tensors("regmean", None, models, statistics=own)
    np.testing.assert_allclose(merged[:, 2], (models[0] + models[1])[:, 2] / 2, rtol=1e-12)
    nothing = merge_tensors("regmean", None, models, statistics=[torch.zeros(6, 6)] * 2)
    np.testing.assert_allclose(nothing, (models[0] + models[1]) / 2, rtol=1e-12)


@pytest.mark.parametrize("share", [0.0, 10.0])
def test_the_default_ridge_bears_the_rounding_of_what_is_stored(share: float) -> None:
    """With fewer tokens than inputs, one that is huge, and all of them off their centre."""
    own = []
    for seed in range(2):
        x = (drawn(seed, 150, 300) + share * drawn(10 + seed, 300)).float()
        x[:, 3] *= 100
        own.append(x.mT @ x / len(x))
    models = [drawn(seed, 4, 300) for seed in range(2)]
    assert min(float(torch.linalg.eigvalsh(gram.double())[0]) for gram in own) < 0
    assert bool(torch.isfinite(merge_tensors("regmean", None, models, statistics=own)).all())


def test_where_nothing_is_sure_fisher_averages() -> None:
    models = [drawn(seed, 4, 6) for seed in range(2)]
    merged = merge_tensors("fisher", None, models, statistics=[torch.zeros(4, 6)] * 2, weight=[1.0, 3.0])
    np.testing.assert_allclose(merged, (models[0] + 3 * models[1]) / 4, rtol=1e-12)


def test_balance_is_over_the_whole_model() -> None:
    """Both tensors have the scale of all of the model's information, not each its own."""
    models = [{name: drawn(seed + i, 3, 3) for i, name in enumerate("ab")} for seed in (0, 10)]
    beside = [{name: drawn(seed + i, 3, 3).abs() for i, name in enumerate("ab")} for seed in (20, 30)]
    merged = merge_states("fisher", None, models, statistics=beside, balance=True, epsilon=1e-9)
    scale = [1 / (float(sum(f.square().sum() for f in own.values())) ** 0.5 + 1e-6) for own in beside]
    for name in "ab":
        sure = [c * (own[name] + 1e-9) for c, own in zip(scale, beside, strict=True)]
        expected = (sure[0] * models[0][name] + sure[1] * models[1][name]) / (sure[0] + sure[1])
        np.testing.assert_allclose(merged[name], expected, rtol=1e-9)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_tensors_without_statistics_are_averaged(method: str) -> None:
    models = [{"a": drawn(seed, 3, 3), "norm": drawn(seed, 3)} for seed in range(2)]
    beside = [{"a": gram.abs()} for gram in grams(range(2), 3)]
    merged = merge_states(method, None, models, statistics=beside, weight=[1.0, 3.0])
    np.testing.assert_allclose(merged["norm"], (models[0]["norm"] + 3 * models[1]["norm"]) / 4, rtol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    models = [drawn(seed, 4, 6) for seed in range(2)]
    with pytest.raises(UsageError, match=r"expected statistics of shape \(6, 6\), got \(4, 4\)"):
        merge_tensors("regmean", None, models, statistics=grams(range(2), 4))
    with pytest.raises(UsageError, match="needs the statistics of each of 2 models, got 1"):
        merge_tensors("regmean", None, models, statistics=grams(range(1), 6))
    with pytest.raises(UsageError, match="sum to zero"):
        merge_tensors("regmean", None, models, statistics=grams(range(2), 6), weight=[0.0, 0.0])
    indefinite = [torch.diag(torch.tensor([1.0, -1, 1, 1, 1, 1]))] * 2
    with pytest.raises(RunError, match="not positive definite"):
        merge_tensors("regmean", None, models, statistics=indefinite)
    with pytest.raises(RunError, match="NaN or infinity"):
        merge_tensors("regmean", None, models, statistics=[torch.full((6, 6), torch.nan)] * 2)
