"""VaRM and SCE on worked examples: numbers that the released code, mergekit's and the paper's formulas gave."""

from __future__ import annotations

import pytest
import torch

from mergekit_lite.methods import merge_states, merge_tensors
from tests.methods.whole import coefficients


def tensor(values: list[float] | list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: torch.Tensor, expected: torch.Tensor | list[float] | list[list[float]]) -> None:
    """Equal to seven printed digits."""
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), atol=6e-8, rtol=0)


# --- VaRM -----------------------------------------------------------------------------------------------------------

Q, UP, LN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.ln.weight"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
PIVOT = {
    Q: tensor([[1, 0], [0, 1]]),
    UP: tensor([[2, -2]]),
    LN: tensor([1, 1]),
    EMBED: tensor([[0.5, -0.5], [1, 0.25]]),
    NORM: tensor([1, 1]),
}
A = {
    Q: tensor([[0.1, 0], [0, -0.1]]),
    UP: tensor([[0.3, 0.1]]),
    LN: tensor([0.1, 0]),
    EMBED: tensor([[0, 0.1], [0, 0]]),
}
B = {Q: tensor([[0.2, 0.2], [0, 0]]), UP: tensor([[-0.1, 0.1]]), LN: tensor([0.1, 0.1])}
MODELS = [{name: pivot + change.get(name, 0) for name, pivot in PIVOT.items()} for change in (A, B)]


def test_varm_by_tensors() -> None:
    merged = merge_states("varm", PIVOT, MODELS)
    close(merged[Q], [[1.18, 0.16], [0, 0.98]])
    close(merged[UP], [[2.2333333, -1.9]])
    close(merged[LN], [1.1, 1.0666667])
    close(merged[EMBED], [[0.5, -0.4], [1, 0.25]])  # the formula's; the code's zero rule would give −0.45
    close(merged[NORM], [1, 1])
    for name, expected in {Q: [0.2, 0.8], UP: [0.8333333, 0.1666667], LN: [0.3333333, 0.6666667]}.items():
        found = coefficients("varm", PIVOT[name], [model[name] for model in MODELS])
        assert found == pytest.approx(expected, abs=6e-8)
    assert coefficients("varm", PIVOT[NORM], [PIVOT[NORM]] * 2) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("granularity", "weights"),
    [
        ("model", dict.fromkeys(PIVOT, (0.5384615, 0.4615385))),
        ("layer", {**dict.fromkeys(PIVOT, (0.6, 0.4)), EMBED: (0.5, 0.5), NORM: (0.5, 0.5)}),
        ("module", {Q: (0.2, 0.8), UP: (0.8333333, 0.1666667), LN: (0.3333333, 0.6666667), EMBED: (1, 0)}),
    ],
)
def test_varm_by_larger_units(granularity: str, weights: dict[str, tuple[float, float]]) -> None:
    merged = merge_states("varm", PIVOT, MODELS, granularity=granularity)
    for name, (a, b) in weights.items():
        close(merged[name], PIVOT[name] + a * A.get(name, 0) + b * B.get(name, 0))


def test_varm_by_modules_adds_up_the_means_of_a_module() -> None:
    """k's mean squares 0.01/0 beside q's 0.005/0.02: shares 0.015 and 0.02 of 0.035."""
    k = Q.replace("q_proj", "k_proj")
    base = {Q: PIVOT[Q], k: tensor([0, 0])}
    models = [{Q: MODELS[0][Q], k: tensor([0.1, 0.1])}, {Q: MODELS[1][Q], k: tensor([0, 0])}]
    close(merge_states("varm", base, models, granularity="module")[k], [0.1 * 15 / 35] * 2)


def test_varm_by_elements_leaves_what_none_changed() -> None:
    """The released code turns these elements into 0."""
    merged = merge_states("varm", PIVOT, MODELS, granularity="element")
    close(merged[NORM], [1, 1])
    close(merged[EMBED], [[0.5, -0.4], [1, 0.25]])
    close(merged[Q], [[1 + (0.1**3 + 0.2**3) / (0.1**2 + 0.2**2), 0.2], [0, 0.9]])


# --- SCE ------------------------------------------------------------------------------------------------------------

BASE = tensor([[1, -1, 0.5], [0, 2, -0.5]])
DELTAS = [
    tensor([[0.4, -0.2, 0], [0.1, 0.3, -0.1]]),
    tensor([[0.2, 0.2, 0], [-0.3, 0.3, -0.1]]),
    tensor([[-0.1, 0.4, 0], [0.2, 0.3, 0.5]]),
]
TARGETS = [BASE + delta for delta in DELTAS]
NOTHING = [[0.0] * 3] * 2
ETA = {
    1.0: [0.2743363, 0.2389381, 0.4867257],
    0.5: [0.0980392, 0.0980392, 0.8039216],
    0.25: [0.0370370, 0.0370370, 0.9259259],
    0.2: [1 / 3] * 3,
}
WHOLE = [[0.30689655, 0.33414634, 0], [0.16395349, 0.3, 0.5]]


@pytest.mark.parametrize(
    ("variant", "topk", "moved"),
    [
        ("fusechat", 1.0, WHOLE),
        ("mergekit", 1.0, WHOLE),
        ("paper", 1.0, [[0.15752212, 0.24247788, 0], [0.12477876, 0.3, 0.24336283]]),
        ("fusechat", 0.5, [[0.3, 0.37826087, 0], [0.18913043, 0.3, 0.5]]),
        ("mergekit", 0.5, [[0, 0.37826087, 0], [0, 0, 0.5]]),
        ("paper", 0.5, [[0, 0.34117647, 0], [0, 0, 0.40196078]]),
        ("fusechat", 0.25, [[0.3, 0.39230769, 0], [0.19615385, 0.3, 0.5]]),
        ("mergekit", 0.25, [[0, 0, 0], [0, 0, 0.5]]),
        ("paper", 0.25, [[0, 0, 0], [0, 0, 0.46296296]]),
        ("fusechat", 0.2, [[0.3, 0.3, 0], [0.15, 0.3, 0.5]]),
        ("mergekit", 0.2, NOTHING),
        ("paper", 0.2, NOTHING),
    ],
)
def test_sce(variant: str, topk: float, moved: list[list[float]]) -> None:
    merged = merge_tensors("sce", BASE, TARGETS, select_topk=topk, variant=variant)
    torch.testing.assert_close(merged - BASE, tensor(moved), atol=6e-9, rtol=0)
    found = coefficients("sce", BASE, TARGETS, select_topk=topk, variant=variant)
    assert found == pytest.approx(ETA[topk], abs=6e-8)


def test_sce_coefficients_have_no_scale() -> None:
    """Where mergekit 0.1.5 falls back to 1/3 each."""
    for scale in (1e-3, 1e-8, 1e4):
        small = [delta * scale for delta in DELTAS]
        assert coefficients("sce", BASE * 0, small) == pytest.approx(ETA[1.0], abs=6e-8), scale
        assert coefficients("sce", BASE * 0, small, select_topk=0.5) == pytest.approx(ETA[0.5], abs=6e-8), scale


@pytest.mark.parametrize("rms", [5e-4, 2e-4, 6e-6])
def test_sce_coefficients_of_real_sizes(rms: float) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(256, 256, generator=generator) * rms * size for size in (0.5, 1, 2)]
    found = coefficients("sce", torch.zeros(256, 256), deltas)
    assert found == pytest.approx([0.0476, 0.1905, 0.7619], abs=2e-3)


def test_sce_sign_tie_elects_plus() -> None:
    zero, up, down = tensor([0, 1]), tensor([0.5, 1]), tensor([-0.5, 1])
    close(merge_tensors("sce", zero, [up, down], variant="fusechat"), [0.5, 1])
    close(merge_tensors("sce", zero, [up, down], variant="paper"), [0.25, 1])


def test_sce_identical_targets_have_nothing_to_select() -> None:
    target = BASE + 0.1
    close(merge_tensors("sce", BASE, [target, target], select_topk=0.5, variant="fusechat"), target)
    for variant in ("paper", "mergekit"):
        close(merge_tensors("sce", BASE, [target, target], select_topk=0.5, variant=variant), BASE)
    close(merge_tensors("sce", BASE, [BASE, BASE]), BASE)
    assert coefficients("sce", BASE, [BASE, BASE]) == [0.5, 0.5]
